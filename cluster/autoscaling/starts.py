"""Duration of start-ups, from the decision to the replica that serves, by phase.

Replicas report Unix times, so ``StartTracker`` is given Unix times as well; the clocks of the
machines must agree to about a second.
"""

from collections.abc import Iterable
from typing import NamedTuple

REPORT_TIMEOUT_S = 60.0
"""Time for which a replica's own report is awaited after it serves."""
CLOCK_TOLERANCE_S = 1.0


class ReplicaStart(NamedTuple):
    """A replica's report on its own start."""

    created_at: float
    """Unix time at which its process was created."""
    took_s: float
    """Time from there until it could serve."""

    @property
    def ready_at(self) -> float:
        """Unix time at which it could serve."""
        return self.created_at + self.took_s


class ScaleUp(NamedTuple):
    """A pool's target that rose above the number of running replicas."""

    target: int
    num_new: int
    """Number of replicas that had to start."""
    at: float
    """Time of the decision."""


class ScaleUpTracker:
    """The scale-up of a pool that is under way, one at a time."""

    def __init__(self) -> None:
        self._target: int | None = None
        self._current: ScaleUp | None = None

    def follow(self, now: float, target: int, running: int) -> ScaleUp | None:
        """Return the scale-up that has completed since the last call, if any.

        A scale-up whose target was lowered again does not complete.
        """
        before, self._target = self._target, target
        current = self._current
        if current is None:
            has_risen = before is None or target > before
            if has_risen and running < target:  # otherwise a lost replica is being replaced
                self._current = ScaleUp(target, target - running, now)
            return None
        if running < current.target <= target:
            return None
        self._current = None
        return current if running >= current.target else None


class StartTracker:
    """Durations of one pool's starts."""

    def __init__(self) -> None:
        self._tracker = ScaleUpTracker()
        self._completed: tuple[ScaleUp, float] | None = None  # and when it completed

    def follow(
        self, now: float, target: int, running: int, starts: Iterable[ReplicaStart]
    ) -> dict[str, float] | None:
        """Return the phases in seconds of a completed scale-up, after its last replica's report.

        ``scheduling`` (until the process was created), ``start`` (until the replica could serve)
        and ``notice`` (until Serve's controller knew) add up to ``decision``, except for clock
        differences.
        """
        scale_up = self._tracker.follow(now, target, running)
        if scale_up is not None:
            self._completed = scale_up, now
        if self._completed is None:
            return None
        scale_up, completed_at = self._completed
        earliest = scale_up.at - CLOCK_TOLERANCE_S
        reported = [start for start in starts if start.ready_at >= earliest]
        if len(reported) < scale_up.num_new and now - completed_at <= REPORT_TIMEOUT_S:
            return None
        self._completed = None
        if not reported:
            return None
        last = max(reported, key=lambda start: start.ready_at)
        phases = {
            "scheduling": max(0.0, last.created_at - scale_up.at),
            "start": last.took_s,
            "notice": max(0.0, completed_at - last.ready_at),
        }
        return {**phases, "decision": sum(phases.values())}
