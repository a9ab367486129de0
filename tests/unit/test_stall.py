"""A part of an engine that has work and makes no progress is detected, and nothing else is."""

import pytest

from cluster.engines.stall import MAX_CHECK_GAP_S, StallDetector
from cluster.errors import EngineDeadError


class Watched:
    """A detector with a timeout of 30 s, checked every second."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.detector = StallDetector("engine", 30.0, clock=lambda: self.now)

    def check_for(self, duration_s: int, progress: int, *, is_busy: bool = True) -> None:
        for _ in range(duration_s):
            self.now += 1.0
            self.detector.check(progress, is_busy=is_busy)


def test_work_without_progress_is_a_stall_and_stays_one() -> None:
    watched = Watched()
    watched.check_for(30, progress=5)
    with pytest.raises(EngineDeadError, match="engine of the replica made no progress for 30 s"):
        watched.check_for(2, progress=5)
    with pytest.raises(EngineDeadError):  # its requests are lost, even if it continues
        watched.check_for(1, progress=6)


def test_slow_progress_is_no_stall() -> None:
    watched = Watched()
    for step in range(10):
        watched.check_for(29, progress=step)


def test_an_idle_part_does_not_stall_and_has_the_whole_timeout_for_new_work() -> None:
    watched = Watched()
    watched.check_for(100, progress=5, is_busy=False)
    watched.check_for(29, progress=5)


def test_time_without_checks_does_not_count() -> None:
    watched = Watched()
    watched.check_for(20, progress=5)
    watched.now += MAX_CHECK_GAP_S + 20
    watched.check_for(30, progress=5)
    with pytest.raises(EngineDeadError):
        watched.check_for(2, progress=5)
