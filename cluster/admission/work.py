"""How much work a request is, guessed before it runs and learned from those that ran. Pure."""

_MEMORY = 0.02
"""Weight of the newest request: the estimates follow the last fifty or so."""
_BYTES_PER_TOKEN = 4.0  # of English text under common vocabularies; until something is learned
_MIN_TOKENS = 1.0


class WorkEstimator:
    """One pool's estimate of token work: prompt bytes by a learned ratio, plus the completion.

    Args:
        completion_tokens: Expected of a request until something is learned.
    """

    def __init__(self, completion_tokens: float) -> None:
        self.tokens_per_byte = 1 / _BYTES_PER_TOKEN
        self.completion_tokens = completion_tokens

    def estimate(self, body_bytes: int, max_tokens: float | None = None) -> float:
        """Tokens that a request with such a body will take; ``max_tokens`` bounds its answer."""
        answer = self.completion_tokens
        if max_tokens is not None:
            answer = min(answer, max_tokens)
        return max(_MIN_TOKENS, body_bytes * self.tokens_per_byte + answer)

    def learn(self, body_bytes: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Take in what a request took; ``prompt_tokens`` are those that had to be computed."""
        if body_bytes > 0:
            self.tokens_per_byte += _MEMORY * (prompt_tokens / body_bytes - self.tokens_per_byte)
        self.completion_tokens += _MEMORY * (completion_tokens - self.completion_tokens)
