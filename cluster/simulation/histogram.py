"""Weighted values from which percentiles are taken, within half a percent."""

import math
from collections import Counter

_STEP = math.log(1.01)
_LEAST = 1e-6


class Histogram:
    """Bins that are each a hundredth wider than the one before; memory does not grow."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self.weight = 0
        self.sum = 0.0

    def add(self, value: float, weight: int = 1) -> None:
        """Take in a value of at least 0, ``weight`` times."""
        self._bins[round(math.log(max(value, _LEAST)) / _STEP)] += weight
        self.weight += weight
        self.sum += value * weight

    def add_all(self, other: "Histogram") -> None:
        """Take in another one."""
        self._bins.update(other._bins)
        self.weight += other.weight
        self.sum += other.sum

    @property
    def mean(self) -> float:
        """Of all values; 0 where there are none."""
        return self.sum / self.weight if self.weight else 0.0

    def percentile(self, percent: float) -> float:
        """The value below which ``percent`` of the weight lies; 0 where there is none."""
        wanted = percent / 100 * self.weight
        below = 0
        for index in sorted(self._bins):
            below += self._bins[index]
            if below >= wanted:
                value = math.exp(index * _STEP)
                return 0.0 if value <= _LEAST else value
        return 0.0
