"""A request as a routing policy sees it, and the estimate of its tokens before it ran."""

from dataclasses import dataclass

from cluster.routing.fingerprint import EMPTY_FINGERPRINT, TOKEN_ID_BYTES, FanOut, Fingerprint
from cluster.usage import Usage

TOKENS_PER_BYTE_PRIOR = 0.25
"""Tokens per byte of text before anything was measured; about right for English."""
PRIOR_BYTES = 4096.0
"""Bytes of text that the prior is worth."""
COMPLETION_TOKENS_PRIOR = 128.0
"""Completion tokens of a generator's request before anything was measured."""
MAX_COMPLETION_TOKENS = 2**31
"""Cap of a request's own limit; the engine rejects anything near it."""
MAX_TOKEN_BYTES = 128
"""Longest tokens of the usual vocabularies, such as runs of spaces."""
DECAY = 0.99
"""Share of a sum that is kept at each observation: about the last 100 count."""

SINGLE = FanOut()
"""A request of one prompt and one sequence."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as a policy sees it."""

    prompt_tokens: float
    """Estimated, because the router does not tokenize."""
    completion_tokens: float = 0.0
    """Expected tokens of all sequences; 0 if the pool does not generate."""
    prefix: tuple[int, ...] = ()
    """64-bit hashes of growing prefixes of the prompt, the shortest first."""
    prefix_tokens: tuple[float, ...] = ()
    """Prompt tokens up to the end of each prefix."""
    session: str | None = None
    """Key that requests of one session share."""
    adapter: str | None = None
    """LoRA adapter that the request needs."""
    streamed: bool = False
    """True if the router can observe the first token."""
    fan_out: FanOut = SINGLE
    """Prompts and sequences of the request."""


UNKNOWN_REQUEST = RequestView(prompt_tokens=0.0)
"""Stands for a request of which the router has read nothing."""


class TokenEstimator:
    """Estimates of a pool's requests, learned from the usage of finished ones."""

    def __init__(self, *, generates: bool) -> None:
        # Decaying sums over finished requests; each starts with its prior.
        self._text_tokens, self._text_bytes = TOKENS_PER_BYTE_PRIOR * PRIOR_BYTES, PRIOR_BYTES
        self._uncached_tokens = self._prompt_tokens = 1.0
        self._mean_completion_tokens = COMPLETION_TOKENS_PRIOR if generates else 0.0
        self.context_tokens = float("inf")
        """Longest prompt and completion of the model together; infinite if unknown."""

    @property
    def tokens_per_byte(self) -> float:
        """Prompt tokens per byte of a prompt's text, or of a body that was not read."""
        return self._text_tokens / self._text_bytes

    def view_request(
        self,
        body_bytes: int,
        text: Fingerprint = EMPTY_FINGERPRINT,
        session: str | None = None,
        max_tokens: float | None = None,
        *,
        streamed: bool = False,
        adapter: str | None = None,
        fan_out: FanOut = SINGLE,
    ) -> RequestView:
        """Return a policy's view of a request; ``text`` is the fingerprint of its first prompt.

        ``session``, from a header, overrides the fingerprint's; ``max_tokens`` limits each
        completion if the fingerprint has no limit.
        """
        ratio = 1 / TOKEN_ID_BYTES if text.is_tokens else self.tokens_per_byte
        if text.max_tokens is not None:
            max_tokens = float(min(text.max_tokens, MAX_COMPLETION_TOKENS))
        completion_tokens = self._mean_completion_tokens
        if max_tokens is not None:
            completion_tokens = max(0.0, min(completion_tokens, max_tokens))
        if fan_out.prompts == 1:
            prompt_tokens = (text.total_bytes or body_bytes) * ratio
        else:
            prompt_tokens = body_bytes * self.tokens_per_byte
        return RequestView(
            prompt_tokens=min(prompt_tokens, self.context_tokens * fan_out.prompts),
            completion_tokens=min(completion_tokens, self.context_tokens) * fan_out.sequences,
            prefix=text.hashes,
            prefix_tokens=tuple([end * ratio for end in text.ends]),
            session=text.session if session is None else session,
            streamed=streamed,
            adapter=adapter,
            fan_out=fan_out,
        )

    def exceeds_context(self, text: Fingerprint) -> bool:
        """Return True if a prompt is certainly longer than the model's context."""
        max_bytes = TOKEN_ID_BYTES if text.is_tokens else MAX_TOKEN_BYTES
        return text.total_bytes > self.context_tokens * max_bytes

    def work_tokens(self, view: RequestView) -> float:
        """Return the tokens to compute for a request, at least 1, with the usual cache hits."""
        uncached_share = self._uncached_tokens / self._prompt_tokens
        return max(1.0, view.prompt_tokens * uncached_share + view.completion_tokens)

    def learn_usage(
        self,
        body_bytes: int,
        usage: Usage,
        text: Fingerprint = EMPTY_FINGERPRINT,
        fan_out: FanOut = SINGLE,
    ) -> None:
        """Learn from a finished request; arguments as for ``view_request``."""
        prompt_tokens = max(0, usage.prompt_tokens)
        if not text.is_tokens:
            num_bytes = (fan_out.prompts == 1 and text.total_bytes) or body_bytes
            self._text_tokens = self._text_tokens * DECAY + prompt_tokens
            self._text_bytes = self._text_bytes * DECAY + num_bytes
        uncached_tokens = max(0, usage.prompt_tokens - usage.cached_tokens)
        self._uncached_tokens = self._uncached_tokens * DECAY + uncached_tokens
        self._prompt_tokens = self._prompt_tokens * DECAY + prompt_tokens
        completion_tokens = max(0, usage.completion_tokens) / fan_out.sequences
        completion_excess = completion_tokens - self._mean_completion_tokens
        self._mean_completion_tokens += (1.0 - DECAY) * completion_excess
