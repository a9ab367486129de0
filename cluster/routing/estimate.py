"""How many tokens a request will take, before anybody has counted them."""

from cluster.routing.fingerprint import EMPTY_FINGERPRINT, TOKEN_ID_BYTES, Fingerprint
from cluster.routing.request import RequestView
from cluster.usage import Usage

TOKENS_PER_BYTE = 0.25
"""Of a prompt's text, before anything was measured; English has about this."""
PRIOR_BYTES = 4096.0
COMPLETION_TOKENS = 128.0
"""Of a generator, before anything was measured."""
MOST_TOKENS = 2**31
"""What is beyond it, the engine refuses."""
MEMORY = 0.99
"""What is left of a sum after one more request: about the last 100 count."""


class TokenEstimate:
    """Learned from what a pool's requests took.

    Args:
        generates: Whether there are completion tokens at all.
    """

    def __init__(self, *, generates: bool) -> None:
        self._tokens, self._bytes = TOKENS_PER_BYTE * PRIOR_BYTES, PRIOR_BYTES
        self._computed = self._prompts = 1.0
        self._completion = COMPLETION_TOKENS if generates else 0.0

    @property
    def tokens_per_byte(self) -> float:
        """Prompt tokens for each byte of a prompt's text, or of a body that was not read."""
        return self._tokens / self._bytes

    def view(
        self,
        body_bytes: int,
        text: Fingerprint = EMPTY_FINGERPRINT,
        session: str | None = None,
        max_tokens: float | None = None,
        *,
        streamed: bool = False,
        adapter: str | None = None,
    ) -> RequestView:
        """What is known of a request.

        Args:
            body_bytes: The length of its body.
            text: What was read of it.
            session: What it says beside its body of what it belongs to.
            max_tokens: The longest completion that it takes, where ``text`` does not say.
            streamed: Whether its first token will be seen.
            adapter: The LoRA adapter that it needs, where replicas cannot have all.
        """
        ratio = 1 / TOKEN_ID_BYTES if text.is_tokens else self.tokens_per_byte
        completion = self._completion
        most = max_tokens if text.max_tokens is None else float(min(text.max_tokens, MOST_TOKENS))
        if most is not None:
            completion = max(0.0, min(completion, most))
        return RequestView(
            prompt_tokens=(text.total_bytes or body_bytes) * ratio,
            completion_tokens=completion,
            prefix=text.hashes,
            prefix_tokens=tuple([end * ratio for end in text.ends]),
            session=text.session if session is None else session,
            streamed=streamed,
            adapter=adapter,
        )

    def work(self, view: RequestView) -> float:
        """Tokens that will have to be computed for it, at least 1; caches hold the usual share."""
        return max(
            1.0, view.prompt_tokens * self._computed / self._prompts + view.completion_tokens
        )

    def learn(self, body_bytes: int, usage: Usage, text: Fingerprint = EMPTY_FINGERPRINT) -> None:
        """Take in what a request took."""
        if not text.is_tokens:
            self._tokens = self._tokens * MEMORY + max(0, usage.prompt_tokens)
            self._bytes = self._bytes * MEMORY + (text.total_bytes or body_bytes)
        computed = max(0, usage.prompt_tokens - usage.cached_tokens)
        self._computed = self._computed * MEMORY + computed
        self._prompts = self._prompts * MEMORY + max(0, usage.prompt_tokens)
        self._completion += (1.0 - MEMORY) * (max(0, usage.completion_tokens) - self._completion)
