"""Event queue with the simulated clock."""

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Calls in the order of their times; calls at the same time in the order of scheduling."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_scheduled = 0

    def schedule(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Schedule a call; a time in the past means now."""
        self._num_scheduled += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num_scheduled, call, args))

    def run(self) -> None:
        heap = self._heap
        while heap:
            self.now_s, _, call, args = heapq.heappop(heap)
            call(*args)
