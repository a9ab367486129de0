"""Delay and budget of second tries: after the 99th percentile of a pool's latencies."""

from collections import deque
from dataclasses import dataclass, field
from math import log2

SHARE = 0.99
"""Percentile of the latency after which a request is sent again, 0 to 1."""
WINDOW = 500
"""Latencies that count, per size of the request."""
MIN_KNOWN = 100
"""Latencies from which the percentile is known."""
UPDATE_EVERY = 50
"""Latencies between two computations of the percentile."""
MAX_BURST = 10.0
"""Hedges that a pool may save up while none are needed."""
MEAN_WEIGHT = 0.02
"""Weight of the newest request in the mean size."""


@dataclass(slots=True)
class _Latencies:
    """The last latencies of requests of about one size."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    percentile_s: float | None = None
    num_new: int = 0

    def add(self, latency_s: float) -> None:
        self.values.append(latency_s)
        self.num_new += 1
        if self.num_new >= UPDATE_EVERY and len(self.values) >= MIN_KNOWN:
            self.num_new = 0
            self.percentile_s = sorted(self.values)[int(SHARE * len(self.values))]


class Hedger:
    """Delay and budget of one pool's hedges.

    At any time, the hedges are at most ``max_share`` of the requests so far, and so are their
    tokens.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._latencies: dict[int, _Latencies] = {}  # by the power of 2 of the work
        self._credit = self._credit_tokens = 0.0
        self._mean_tokens = 0.0

    @property
    def is_enabled(self) -> bool:
        return self.max_share > 0.0

    def add_request(self, work_tokens: float) -> None:
        """Count a request, whether or not it is hedged later."""
        if not self._mean_tokens:
            self._mean_tokens = work_tokens
        self._mean_tokens += MEAN_WEIGHT * (work_tokens - self._mean_tokens)
        self._credit = min(MAX_BURST, self._credit + self.max_share)
        tokens = self._credit_tokens + self.max_share * work_tokens
        self._credit_tokens = min(max(MAX_BURST * self._mean_tokens, self._credit_tokens), tokens)

    def delay_s(self, work_tokens: float) -> float | None:
        """Return the time after which to hedge a request of this size; None if unknown."""
        latencies = self._latencies.get(_size(work_tokens))
        return None if latencies is None else latencies.percentile_s

    def observe(self, work_tokens: float, latency_s: float) -> None:
        """Record the time until the first answer to a request."""
        self._latencies.setdefault(_size(work_tokens), _Latencies()).add(latency_s)

    def may_hedge(self, work_tokens: float) -> bool:
        """Return True if the budget allows to send a request of this size again."""
        return self._credit >= 1.0 and self._credit_tokens >= work_tokens

    def count_hedge(self, work_tokens: float) -> None:
        """Take a hedge from the budget."""
        self._credit -= 1.0
        self._credit_tokens -= work_tokens


def _size(work_tokens: float) -> int:
    return int(log2(max(1.0, work_tokens)))
