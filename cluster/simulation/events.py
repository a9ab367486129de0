"""Simulated time: what happens next."""

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Calls in the order of their times; those of the same time in the order of the requests."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num = 0

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call it then; a time that has passed is now."""
        self._num += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num, call, args))

    def run(self) -> None:
        """Until nothing is left."""
        heap = self._heap
        while heap:
            self.now_s, _, call, args = heapq.heappop(heap)
            call(*args)
