"""Detection of engines that hang: they have work and make no progress."""

import logging
import time
from collections.abc import Callable

from cluster.errors import EngineDeadError

logger = logging.getLogger(__name__)

MAX_CHECK_GAP_S = 10.0
"""Longest time between two checks. After a longer gap the detection starts over, because nothing is
known about the time between: the caller may have hung itself."""


class StallDetector:
    """Progress of one part of an engine; ``check`` is called every second by the health check.

    A stall is final, because the replica stops serving when it is detected.
    """

    def __init__(
        self, part: str, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout_s = timeout_s
        """Seconds without progress that are a stall; may be changed."""
        self._part = part
        self._clock = clock
        self._progress: object = None
        self._progress_at = self._checked_at = clock()
        self._has_stalled = False

    def check(self, progress: object, *, is_busy: bool) -> None:
        """Note the progress, a value that changes with every step.

        Raises:
            EngineDeadError: The part has been busy without progress for the timeout.
        """
        now = self._clock()
        is_observed = now - self._checked_at <= MAX_CHECK_GAP_S
        if not is_busy or progress != self._progress or not is_observed:
            self._progress, self._progress_at = progress, now
        self._checked_at = now
        if not self._has_stalled and now - self._progress_at <= self.timeout_s:
            return
        stall = f"The {self._part} of the replica made no progress for {self.timeout_s:g} s"
        if not self._has_stalled:
            self._has_stalled = True
            logger.error("%s, although it has work", stall)
        raise EngineDeadError(f"{stall}; try again.")
