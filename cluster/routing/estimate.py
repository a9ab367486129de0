"""How many tokens a request will take, before anybody has counted them."""

from cluster.routing.request import RequestView, Usage

TOKENS_PER_BYTE = 0.25
"""Of a request's body, before anything was measured; English text has about this."""
PRIOR_BYTES = 4096.0
COMPLETION_TOKENS = 128.0
"""Of a generator, before anything was measured."""
MEMORY = 0.99
"""What is left of a sum after one more request: about the last 100 count."""


class TokenEstimate:
    """Learned from what a pool's requests took.

    Args:
        generates: Whether there are completion tokens at all.
    """

    def __init__(self, *, generates: bool) -> None:
        self._tokens, self._bytes = TOKENS_PER_BYTE * PRIOR_BYTES, PRIOR_BYTES
        self._completion = COMPLETION_TOKENS if generates else 0.0

    @property
    def tokens_per_byte(self) -> float:
        """Prompt tokens for each byte of a body."""
        return self._tokens / self._bytes

    def view(self, body_bytes: int) -> RequestView:
        """What is known of a request of which nothing was read but its length."""
        return RequestView(body_bytes * self.tokens_per_byte, self._completion)

    def learn(self, body_bytes: int, usage: Usage) -> None:
        """Take in what a request with such a body took."""
        self._tokens = self._tokens * MEMORY + max(0, usage.prompt_tokens)
        self._bytes = self._bytes * MEMORY + body_bytes
        self._completion += (1.0 - MEMORY) * (max(0, usage.completion_tokens) - self._completion)
