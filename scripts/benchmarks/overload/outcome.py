"""What became of one request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

Result = Literal["good", "late", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of one tenant."""

    tenant: str
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
        return "refused" if self.status in (429, 503) else "failed"


Ask = Callable[[str], Awaitable[int]]
"""Sends one request of a tenant and returns the status of its answer once that is whole."""
