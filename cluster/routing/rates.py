"""Rates that are learned from what ends: tokens a second, or a share, of each replica.

A rate is a quotient of two sums, so many small observations weigh as one large one, and a replica
that suddenly is slow shows it with its first request, since that one has most of the seconds.
"""

import numpy as np

from cluster.routing.arrays import FloatArray

MEMORY = 0.95
"""What is left of a sum after one more observation: about the last 20 count."""
FORGET_S = 60.0
"""Seconds after which half of what was observed is forgotten, so that a replica that was slow is
tried again."""

LEAST = 1e-3
"""No rate is taken for lower: what waits is divided by it."""


class LearnedRates:
    """A quotient of sums for each slot, drawn to the pool's median until enough was observed.

    Args:
        prior: The quotient that is assumed before anything was observed.
        weight: The denominator that the prior is worth.
        pooled: The prior follows the median of what was observed; a minority that lies or is
            slow does not move it.
    """

    def __init__(self, prior: float, weight: float, *, pooled: bool = True) -> None:
        self.prior = prior
        self._weight = weight
        self._pooled = pooled
        self._above = np.zeros(0)
        self._below = np.zeros(0)
        self.values: FloatArray = np.zeros(0)
        """The rate of each slot; not to be changed."""

    def grow(self, size: int) -> None:
        """Make room for ``size`` slots."""
        more = np.zeros(size - len(self.values))
        self._above = np.concatenate((self._above, more))
        self._below = np.concatenate((self._below, more))
        self.values = np.concatenate((self.values, more + self.prior))

    def reset(self, slot: int) -> None:
        """Forget what was observed of a slot."""
        self._above[slot] = self._below[slot] = 0.0
        self.values[slot] = self.prior

    def observe(self, slot: int, above: float, below: float) -> None:
        """Take in one observation; what is no finite positive number is passed over."""
        if not (0.0 <= above < np.inf and 0.0 <= below < np.inf):
            return
        self._above[slot] = above = self._above[slot] * MEMORY + above
        self._below[slot] = below = self._below[slot] * MEMORY + below
        rate = (above + self._weight * self.prior) / (below + self._weight)
        self.values[slot] = max(LEAST, rate)

    def refresh(self, elapsed_s: float) -> None:
        """Forget by time, and learn the prior anew; for every second or so."""
        keep = 0.5 ** (elapsed_s / FORGET_S)
        self._above *= keep
        self._below *= keep
        known = self._below > 0.25 * self._weight
        if self._pooled and known.any():
            self.prior = max(LEAST, float(np.median(self._above[known] / self._below[known])))
        rates = (self._above + self._weight * self.prior) / (self._below + self._weight)
        np.maximum(rates, LEAST, out=self.values)
