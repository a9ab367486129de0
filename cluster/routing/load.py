"""Policies that look at load alone: work in seconds, never the number of requests."""

import random

import numpy as np

from cluster.routing.fleet import Fleet
from cluster.routing.request import RequestView
from cluster.routing.ties import Turns


class LeastLoad:
    """The replica that would have done its remaining prefill and decode work first."""

    def __init__(self, seed: int = 0) -> None:
        self._turns = Turns(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The replica with the least work among those with room; equals take turns."""
        slot = self._turns.least(fleet.costs_s())
        return None if slot is None else fleet.ids[slot]


class PowerOfTwo:
    """The less loaded one of two replicas drawn by chance: what is stale misleads it less."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """One of two replicas with room."""
        free = np.flatnonzero(fleet.open())
        if len(free) == 0:
            return None
        pair = self._random.sample(range(len(free)), min(2, len(free)))
        work_s = fleet.work_s()
        return fleet.ids[min((int(free[index]) for index in pair), key=work_s.__getitem__)]


class RoundRobin:
    """Each replica with room in turn."""

    def __init__(self, seed: int = 0) -> None:
        self._last = seed

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The next replica with room."""
        free = np.flatnonzero(fleet.open())
        if len(free) == 0:
            return None
        after = int(np.searchsorted(free, self._last, side="right"))
        self._last = int(free[after % len(free)])
        return fleet.ids[self._last]
