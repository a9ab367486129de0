"""How long it takes from a decision to the replica that answers, and where that time goes.

Owns the one rise of a pool's target that is being followed. What replicas say are Unix times, so
``StartWatch`` is told these too; the clocks of processes must agree to about a second.
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


class Rise(NamedTuple):
    """A pool's target that rose above the replicas that answered."""

    target: int
    num_new: int
    """How many replicas more that is."""
    at: float


class Rises:
    """Follows a pool's target, one rise at a time."""

    def __init__(self) -> None:
        self._target: int | None = None
        self._rise: Rise | None = None

    def follow(self, now: float, target: int, running: int) -> Rise | None:
        """The rise that has been answered since the last call; one that is called off is none."""
        before, self._target = self._target, target
        rise = self._rise
        if rise is None:
            rises = before is None or target > before
            if rises and running < target:  # else one that was lost is replaced
                self._rise = Rise(target, target - running, now)
            return None
        if running < rise.target <= target:
            return None
        self._rise = None
        return rise if running >= rise.target else None


class StartWatch:
    """Tells the phases of the starts of one pool."""

    def __init__(self) -> None:
        self._rises = Rises()
        self._answered: tuple[Rise, float] | None = None

    def follow(
        self, now: float, target: int, running: int, starts: Iterable[Start]
    ) -> dict[str, float] | None:
        """The phases of a start that has ended, once its last replica has reported; else None.

        ``scheduling`` (until the process was made), ``start`` (until the replica could answer) and
        ``notice`` (until Serve's controller knew) add up to ``decision``, but for the clocks.
        """
        rise = self._rises.follow(now, target, running)
        if rise is not None:
            self._answered = rise, now
        if self._answered is None:
            return None
        rise, answered_at = self._answered
        told = [start for start in starts if start.ready_at >= rise.at - CLOCK_S]
        if len(told) < rise.num_new and now - answered_at <= UNTOLD_S:
            return None
        self._answered = None
        if not told:
            return None
        last = max(told, key=lambda start: start.ready_at)
        phases = {
            "scheduling": max(0.0, last.created_at - rise.at),
            "start": last.took_s,
            "notice": max(0.0, answered_at - last.ready_at),
        }
        return {**phases, "decision": sum(phases.values())}
