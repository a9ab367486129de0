"""The smallest of many costs, where nearly equal ones take turns."""

import numpy as np

from cluster.routing.arrays import BoolArray, FloatArray

NEAR_S = 1e-4
NEAR_SHARE = 0.02
"""Costs so near to the least are equal: estimates are no better, and routers that see the same
must not all choose the same."""


class Turns:
    """Chooses among equals in turn.

    Args:
        start: Where to begin; routers beside each other begin at different places.
    """

    def __init__(self, start: int = 0) -> None:
        self._turn = start

    def least(self, costs: FloatArray, allowed: BoolArray) -> int | None:
        """The index of one of the least costs, in seconds, among those allowed; None: none is."""
        masked = np.where(allowed, costs, np.inf)
        if len(masked) == 0 or (least := float(masked[masked.argmin()])) == np.inf:
            return None
        equals = np.flatnonzero(masked <= least * (1.0 + NEAR_SHARE) + NEAR_S)
        self._turn += 1
        return int(equals[self._turn % len(equals)])
