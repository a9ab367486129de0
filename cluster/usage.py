"""Tokens, token times, energy and cost of one request."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec


class Usage(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Usage of a finished request; also the payload of the link's USAGE frame."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the prefix cache saved from being computed."""
    completion_tokens: int
    joules: float | None = None
    """The request's share of the measured energy; None if there is no measurement."""
    cost: float | None = None
    """The request's share of the replica's cost, in the configured currency."""
    source: str = ""
    """Source of ``joules``, or the reason why it is None; see ``cluster.accounting``."""
    ttft_s: float | None = None
    """Time from the engine's receipt of the request to its first token, in seconds."""
    itl_s: float | None = None
    """Mean gap between the tokens of a sequence, in seconds; None without a second token."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed: completion tokens, and prompt tokens not in the cache."""
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens


@dataclass(slots=True)
class UsageCounter:
    """Usage of a request while an engine serves it; the fields are those of ``Usage``."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    joules: float | None = None
    cost: float | None = None
    source: str = ""
    ttft_s: float | None = None
    decode_s: float = 0.0
    """Time from the first to the last token, in seconds, summed over the sequences."""
    num_gaps: int = 0
    """Gaps between tokens in ``decode_s``."""
    settle: Callable[[], None] | None = None
    """Called once before the usage is reported; may fill in ``joules``, ``cost`` and ``source``."""

    def add_times(self, ttft_s: float, decode_s: float, num_tokens: int) -> None:
        """Add the times of a finished sequence: to its first token, and from there to its last."""
        self.ttft_s = ttft_s if self.ttft_s is None else min(self.ttft_s, ttft_s)
        self.decode_s += decode_s
        self.num_gaps += num_tokens - 1

    def report(self) -> Usage | None:
        """Settle and return the usage; None if the application counted no tokens."""
        if not (self.prompt_tokens or self.completion_tokens):
            return None
        if self.settle is not None:
            self.settle()
        return Usage(
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.joules,
            self.cost,
            self.source,
            self.ttft_s,
            self.decode_s / self.num_gaps if self.num_gaps else None,
        )
