"""Policies that look at load alone, and the tie-break that policies share."""

import math
import random

import numpy as np

from cluster.routing.fleet import Fleet
from cluster.routing.request import RequestView
from cluster.routing.table import FloatArray

TIE_S = 1e-4
TIE_SHARE = 0.02
"""Costs within this share (plus ``TIE_S``) of the lowest are ties: estimates are no better than
that, and routers that see the same costs must not all choose the same replica."""


class TieBreaker:
    """Choice of the lowest cost; rows of about the same cost take turns.

    The first turn should differ between routers.
    """

    def __init__(self, start: int = 0) -> None:
        self._turn = start

    def cheapest_row(self, costs_s: FloatArray) -> int | None:
        """Return a row of about the lowest cost; None if every cost is infinite."""
        if len(costs_s) == 0 or (lowest := float(costs_s[costs_s.argmin()])) == math.inf:
            return None
        ties = (costs_s <= lowest * (1.0 + TIE_SHARE) + TIE_S).nonzero()[0]
        self._turn += 1
        return int(ties[self._turn % len(ties)])


class LeastLoad:
    """The replica that would finish its remaining work first; work in seconds, not requests."""

    def __init__(self, seed: int = 0) -> None:
        self._ties = TieBreaker(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        row = self._ties.cheapest_row(fleet.costs_s())
        return None if row is None else fleet.ids[row]


class PowerOfTwo:
    """The less loaded of two replicas drawn at random, which stale loads mislead less."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        rows = np.flatnonzero(fleet.open_rows())
        if len(rows) == 0:
            return None
        pair = self._random.sample(range(len(rows)), min(2, len(rows)))
        work_s = fleet.work_s()
        return fleet.ids[min((int(rows[index]) for index in pair), key=work_s.__getitem__)]


class RoundRobin:
    """The open replicas in turn."""

    def __init__(self, seed: int = 0) -> None:
        self._last_row = seed

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        rows = np.flatnonzero(fleet.open_rows())
        if len(rows) == 0:
            return None
        position = int(np.searchsorted(rows, self._last_row, side="right"))
        self._last_row = int(rows[position % len(rows)])
        return fleet.ids[self._last_row]
