"""Requests of a trace, and their state in a simulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile

from cluster.admission.fair_queue import QueueEntry
from cluster.routing import Placement, RequestView


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace, with the length of its answer."""

    arrival_s: float
    prompt_tokens: int
    completion_tokens: int
    blocks: tuple[int, ...] = ()
    """One id per full block of the prompt; it identifies all tokens up to the block's end."""
    answer_blocks: tuple[int, ...] = ()
    """Further blocks that are full once the answer has ended; the next turn of the conversation
    begins with both."""
    session: str | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: Sequence[TraceRequest]
    block_tokens: int
    """Tokens per block."""

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def max_hit_rate(self) -> float:
        """Share of the prompt tokens that one unbounded cache would hold."""
        seen: set[int] = set()
        cached_tokens = total_tokens = 0
        for request in self.requests:
            count = len(list(takewhile(seen.__contains__, request.blocks)))
            cached_tokens += min(count * self.block_tokens, request.prompt_tokens - 1)
            total_tokens += request.prompt_tokens
            seen.update(request.blocks, request.answer_blocks)
        return cached_tokens / max(1, total_tokens)


class Outcome(Enum):
    """End of a request."""

    DONE = "done"
    FAILED = "failed"
    """Its replica was lost during the answer, or the request does not fit into a KV cache."""
    SHED = "shed"
    """The queue was full."""
    LATE = "late"
    """It timed out in the queue."""


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """State of one request in a simulation."""

    spec: TraceRequest
    router: int
    """Number of the router that it arrives at."""
    attempts: int = 0
    """Replicas that it was placed on."""
    view: RequestView | None = None
    placement: Placement | None = None
    entry: "QueueEntry[SimulatedRequest] | None" = None
    """Its entry while it is queued."""
    first_token_s: float | None = None
    """Time at which the client has the first token."""
    ended_s: float | None = None
    outcome: Outcome | None = None
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.spec.arrival_s

    @property
    def itl_s(self) -> float:
        """Mean time between two tokens; 0 if there is only one."""
        gaps = self.spec.completion_tokens - 1
        if self.first_token_s is None or self.ended_s is None or not gaps:
            return 0.0
        return (self.ended_s - self.first_token_s) / gaps
