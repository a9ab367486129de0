"""Histogram with exponential bins, for percentiles within half a percent."""

import math
from collections import Counter
from collections.abc import Iterable

_BIN_WIDTH = math.log(1.01)  # a bin is 1 % wider than the one before
_MIN_VALUE = 1e-6  # smaller values count as 0


class LogHistogram:
    """Weighted values in exponential bins; memory does not grow with their number."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._bins: Counter[int] = Counter()
        self.weight = 0
        self.sum = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float, weight: int = 1) -> None:
        """Add a value of at least 0, ``weight`` times."""
        self._bins[round(math.log(max(value, _MIN_VALUE)) / _BIN_WIDTH)] += weight
        self.weight += weight
        self.sum += value * weight

    def add_all(self, other: "LogHistogram") -> None:
        self._bins.update(other._bins)
        self.weight += other.weight
        self.sum += other.sum

    @property
    def mean(self) -> float:
        return self.sum / self.weight if self.weight else 0.0

    def percentile(self, percent: float) -> float:
        """Return the value below which ``percent`` of the weight lies; 0 without values."""
        target = percent / 100 * self.weight
        below = 0
        for index in sorted(self._bins):
            below += self._bins[index]
            if below >= target:
                value = math.exp(index * _BIN_WIDTH)
                return 0.0 if value <= _MIN_VALUE else value
        return 0.0
