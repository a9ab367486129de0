"""What became of one request, and of all of one phase."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["good", "late", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of one tenant."""

    tenant: str
    tokens: int
    """That it asked for."""
    asked_s: float
    """Since the phase began."""
    seconds: float
    """Until its whole answer was there."""
    status: int
    in_time: bool

    @property
    def result(self) -> Result:
        """How it counts."""
        if self.status == 200:
            return "good" if self.in_time else "late"
        if self.status == 408:  # Serve itself ends what is not answered at its deadline
            return "late"
        return "refused" if self.status in (429, 503) else "failed"


@dataclass(frozen=True, slots=True)
class Measured:
    """One phase."""

    outcomes: Sequence[Outcome]
    stalled_s: float
    """In which the load's own event loop did not run: the machine was busy elsewhere."""


Ask = Callable[[str, int], Awaitable[int]]
"""Sends one request of a tenant, for so many tokens, and returns the status of its answer once that
is whole."""
