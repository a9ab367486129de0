"""The smallest of many costs, where nearly equal ones take turns."""

import math

from cluster.routing.arrays import FloatArray

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

    def least(self, costs: FloatArray) -> int | None:
        """The index of one of the least costs, in seconds; None: all are inf."""
        if len(costs) == 0 or (least := float(costs[costs.argmin()])) == math.inf:
            return None
        equals = (costs <= least * (1.0 + NEAR_SHARE) + NEAR_S).nonzero()[0]
        self._turn += 1
        return int(equals[self._turn % len(equals)])
