"""How long it takes from a decision to the replica that answers, and where that time goes.

Owns the one rise of a pool's target that is being followed. Times are Unix times, as they come from
several processes; their clocks must agree to about a second.
"""

from collections.abc import Iterable
from typing import NamedTuple

UNTOLD_S = 60.0
"""So long after a replica answers its own report is waited for."""
CLOCK_S = 1.0


class Start(NamedTuple):
    """What a replica says of its own start."""

    created_at: float
    """When its process was made."""
    took_s: float
    """From there until it could answer."""

    @property
    def ready_at(self) -> float:
        """When it could answer."""
        return self.created_at + self.took_s


class StartWatch:
    """Follows one pool."""

    def __init__(self) -> None:
        self._target: int | None = None
        self._asked: tuple[int, int, float] | None = None  # replicas, how many are new, and when
        self._answered_at: float | None = None

    def follow(
        self, now: float, target: int, running: int, starts: Iterable[Start]
    ) -> dict[str, float] | None:
        """The phases of a start that has ended, once its last replica has reported; else None.

        ``scheduling`` (until the process was made), ``start`` (until the replica could answer) and
        ``notice`` (until Serve's controller knew) add up to ``decision``, but for the clocks.
        """
        before, self._target = self._target, target
        if self._asked is None:
            rises = before is None or target > before
            if rises and running < target:  # else one that was lost is replaced
                self._asked = target, target - running, now
            return None
        asked, num_new, decided_at = self._asked
        if self._answered_at is None:
            if target < asked:
                self._forget()
                return None
            if running < asked:
                return None
            self._answered_at = now
        answered_at = self._answered_at
        told = [start for start in starts if start.ready_at >= decided_at - CLOCK_S]
        if len(told) < num_new and now - answered_at <= UNTOLD_S:
            return None
        self._forget()
        if not told:
            return None
        last = max(told, key=lambda start: start.ready_at)
        phases = {
            "scheduling": max(0.0, last.created_at - decided_at),
            "start": last.took_s,
            "notice": max(0.0, answered_at - last.ready_at),
        }
        return {**phases, "decision": sum(phases.values())}

    def _forget(self) -> None:
        self._asked = self._answered_at = None
