"""What a trace is made of."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request, as it arrives and as it will turn out."""

    arrival_s: float
    prompt_tokens: int
    completion_tokens: int
    blocks: tuple[int, ...] = ()
    """One id for each full block of the prompt; it stands for all tokens up to its end."""
    answer_blocks: tuple[int, ...] = ()
    """The blocks after ``blocks`` that are full once the answer has ended; a later turn of the
    conversation begins with both."""
    session: str | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: Sequence[TraceRequest]
    block_tokens: int
    """Tokens of each block."""

    @property
    def duration_s(self) -> float:
        """When the last request arrives."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def most_hits(self) -> float:
        """The share of prompt tokens that a single cache without a bound would hold."""
        seen: set[int] = set()
        held = total = 0
        for request in self.requests:
            count = next(
                (at for at, block in enumerate(request.blocks) if block not in seen),
                len(request.blocks),
            )
            held += min(count * self.block_tokens, request.prompt_tokens - 1)
            total += request.prompt_tokens
            seen.update(request.blocks, request.answer_blocks)
        return held / max(1, total)
