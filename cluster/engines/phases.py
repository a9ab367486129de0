"""How long the parts of a start took."""

import time
from collections.abc import Callable, Mapping


class Phases:
    """How long the parts of a start took, in seconds and in their order.

    They follow one another without a gap, so together they are the whole.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marked_at = clock()
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on ``phase``."""
        self.add({phase: self._clock() - self._marked_at})

    def add(self, parts: Mapping[str, float]) -> None:
        """So much of the time since the last mark was spent on these, as somebody else measured."""
        for phase, took_s in parts.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took_s
            self._marked_at += took_s

    @property
    def total_s(self) -> float:
        """The time from the beginning to the last mark."""
        return sum(self.seconds.values())
