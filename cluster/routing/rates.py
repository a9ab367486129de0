"""Rates of each replica, learned from finished requests: tokens per second, or a share.

A rate is a quotient of two decaying sums, so many small observations weigh as much as one large
one. A replica that suddenly becomes slow shows it with its first request, which contributes most of
the seconds.
"""

import numpy as np

from cluster.routing.table import FloatArray

DECAY = 0.95
"""Share of a sum that is kept at each observation: about the last 20 count."""
HALF_LIFE_S = 60.0
"""Time after which observations count half, so that a replica that was slow is tried again."""
MIN_RATE = 1e-3
"""Lower bound of a rate, because queued work is divided by it."""


class LearnedRates:
    """A quotient of sums for each row, drawn to a common prior while observations are few.

    ``rate = (numerators + weight * prior) / (denominators + weight)``

    Args:
        prior: Rate before anything was observed.
        weight: Denominator that the prior is worth.
        pooled: Let the prior follow the median of the observed rates. A minority of replicas that
            lies or is slow does not move it.
    """

    def __init__(self, prior: float, weight: float, *, pooled: bool = True) -> None:
        self.prior = prior
        self._weight = weight
        self._pooled = pooled
        self._numerators = np.zeros(0)
        self._denominators = np.zeros(0)
        self.values: FloatArray = np.zeros(0)
        """Rate of each row; read-only."""

    def grow(self, size: int) -> None:
        """Make room for ``size`` rows."""
        new = np.zeros(size - len(self.values))
        self._numerators = np.concatenate((self._numerators, new))
        self._denominators = np.concatenate((self._denominators, new))
        self.values = np.concatenate((self.values, new + self.prior))

    def reset_row(self, row: int) -> None:
        """Forget the observations of a row."""
        self._numerators[row] = self._denominators[row] = 0.0
        self.values[row] = self.prior

    def observe(self, row: int, numerator: float, denominator: float) -> None:
        """Add an observation; negative and non-finite numbers are ignored."""
        if not (0.0 <= numerator < np.inf and 0.0 <= denominator < np.inf):
            return
        self._numerators[row] = numerator = self._numerators[row] * DECAY + numerator
        self._denominators[row] = denominator = self._denominators[row] * DECAY + denominator
        rate = (numerator + self._weight * self.prior) / (denominator + self._weight)
        self.values[row] = max(MIN_RATE, rate)

    def refresh(self, elapsed_s: float) -> None:
        """Let observations fade and update the prior; to be called about once a second."""
        keep = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._numerators *= keep
        self._denominators *= keep
        known = self._denominators > 0.25 * self._weight
        if self._pooled and known.any():
            median = float(np.median(self._numerators[known] / self._denominators[known]))
            self.prior = max(MIN_RATE, median)
        rates = (self._numerators + self._weight * self.prior) / (self._denominators + self._weight)
        np.maximum(rates, MIN_RATE, out=self.values)
