"""One request on its way."""

from dataclasses import dataclass
from enum import Enum

from cluster.admission.fair_queue import QueueEntry
from cluster.routing import Placement, RequestView
from cluster.simulation.requests import TraceRequest


class Outcome(Enum):
    """How a request ended."""

    DONE = "done"
    FAILED = "failed"
    """Its replica was lost while it was answered, or it can never fit."""
    SHED = "shed"
    """The queue was full."""
    LATE = "late"
    """It waited in the queue for too long."""


@dataclass(slots=True, eq=False)
class Call:
    """What has become of a request."""

    request: TraceRequest
    router: int
    attempts: int = 0
    view: RequestView | None = None
    placement: Placement | None = None
    entry: "QueueEntry[Call] | None" = None
    """While it waits."""
    first_s: float | None = None
    """When its client has the first token."""
    ended_s: float | None = None
    outcome: Outcome | None = None
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first_s is None else self.first_s - self.request.arrival_s

    @property
    def itl_s(self) -> float:
        """The mean time between two tokens; 0 where there is none."""
        gaps = self.request.completion_tokens - 1
        if self.first_s is None or self.ended_s is None or not gaps:
            return 0.0
        return (self.ended_s - self.first_s) / gaps
