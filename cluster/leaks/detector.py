"""Whether a process leaks: its memory grows over a window and its traffic does not explain it.

Pure; the caller samples. Only pairs of samples count between which the traffic was about the same
and did not grow: a server that gets busier uses more memory rightly, and one that gets much quieter
may give some back.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cluster.config.operations import LeaksConfig
from cluster.leaks.slope import Point, theil_sen

MIN_RISING = 0.8
"""Share of the pairs that must rise: noise around a level has half of them, a leak nearly all."""
MAX_CALMER = 0.1
"""How much less traffic the later of a pair may have, as a share of the window's range."""
MIN_FILLED = 0.9
"""Share of the window that must be seen before anything is called a leak."""


class Growth(NamedTuple):
    """What a window shows."""

    bytes_per_s: float
    """0 where nothing can be said yet."""
    gained_bytes: float
    """Over the window, by the slope."""
    leaking: bool


_NOTHING = Growth(0.0, 0.0, False)


class LeakDetector:
    """Watches one process' memory."""

    def __init__(self, config: LeaksConfig) -> None:
        self._config = config
        self._points: deque[Point] = deque(maxlen=round(config.window_s / config.sample_s) + 1)
        self._first_s: float | None = None

    def sample(self, at_s: float, resident_bytes: float, ongoing: float) -> Growth:
        """Take in a sample; returns what the window shows now.

        Args:
            at_s: A clock that only goes forward.
            resident_bytes: The process' memory.
            ongoing: Requests being served.
        """
        if self._first_s is None:
            self._first_s = at_s
        if at_s - self._first_s < self._config.settle_s:
            return _NOTHING
        self._points.append(Point(at_s, resident_bytes, ongoing))
        slope = theil_sen(list(self._points), self._alike())
        if slope is None:
            return _NOTHING
        spanned_s = at_s - self._points[0].at_s
        gained = slope.bytes_per_s * spanned_s
        leaking = (
            spanned_s >= MIN_FILLED * self._config.window_s
            and slope.rising >= MIN_RISING
            and slope.bytes_per_s >= self._config.min_bytes_per_s
            and gained >= self._config.min_growth_bytes
        )
        return Growth(slope.bytes_per_s, gained, leaking)

    def _alike(self) -> Callable[[Point, Point], bool]:
        traffic = [point.ongoing for point in self._points]
        calmer = MAX_CALMER * (max(traffic) - min(traffic))
        return lambda first, second: 0 <= first.ongoing - second.ongoing <= calmer
