"""Budget of a pool's retries after lost replicas, so that a failure does not multiply the load."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
MAX_RATIO = 0.2
"""Retries per request of the last ``WINDOW_S``."""
MIN_RETRIES = 10
"""Retries in ``WINDOW_S`` that are allowed however few requests there are."""


class RetryBudget:
    """Retries that a pool may make now.

    Args:
        min_retries: Retries in ``WINDOW_S`` that are always allowed; at least one replica's
            requests, so that the loss of one replica fails none of them.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, min_retries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.set_min_retries(min_retries)
        self._clock = clock
        self._retried_s: deque[float] = deque()
        # Requests of the current window and of the one before it.
        self._requests, self._earlier_requests = 0, 0
        self._window_end_s = clock() + WINDOW_S

    def set_min_retries(self, min_retries: int) -> None:
        """Change the retries that are always allowed."""
        self._min_retries = max(MIN_RETRIES, min_retries)

    def add_request(self) -> None:
        """Count a request; call this once per request, not per attempt."""
        self._roll()
        self._requests += 1

    def take_retry(self) -> bool:
        """Count a retry and return True, or return False if the budget is used up."""
        self._roll()
        while self._retried_s and self._retried_s[0] <= self._clock() - WINDOW_S:
            self._retried_s.popleft()
        recent = max(self._requests, self._earlier_requests)
        if len(self._retried_s) >= max(self._min_retries, MAX_RATIO * recent):
            return False
        self._retried_s.append(self._clock())
        return True

    def _roll(self) -> None:
        late_s = self._clock() - self._window_end_s
        if late_s >= 0:
            self._earlier_requests = self._requests if late_s < WINDOW_S else 0
            self._requests = 0
            self._window_end_s = self._clock() + WINDOW_S
