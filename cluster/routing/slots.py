"""One number of each replica in arrays: what a decision reads, kept up to date by ``Fleet``.

A slot is a replica's place in every array. A slot that no replica has is unreachable and idle.
"""

from enum import IntEnum

import numpy as np

from cluster.routing.arrays import AnyArray, BoolArray, FloatArray

FIRST_SIZE = 8
NEVER = np.inf
"""When the first request in line began, where there is none."""


class Reach(IntEnum):
    """How a replica can be reached now."""

    NONE = 0
    LAST_RESORT = 1
    """Is given a request only where every ``USUAL`` replica is full."""
    USUAL = 2


class Slots:
    """The arrays; all have the same length."""

    def __init__(self) -> None:
        self.reach: FloatArray = np.zeros(0)
        self.capacity: FloatArray = np.zeros(0)
        """Requests that it may be given at a time."""
        self.own: FloatArray = np.zeros(0)
        """Requests of this router that have not ended."""
        self.ongoing: FloatArray = np.zeros(0)
        """``own`` and what it was last said to have from other routers."""
        self.others_waiting: FloatArray = np.zeros(0)
        """Of the other routers' requests, those that were said to wait for their prefill."""
        self.kv_cache_usage: FloatArray = np.zeros(0)
        self.head: FloatArray = np.zeros(0)
        """Tokens to be computed of the own request that is first in line."""
        self.behind: FloatArray = np.zeros(0)
        """The same of all own requests that wait behind it for their first token."""
        self.head_since: FloatArray = np.zeros(0)
        """When that one's prefill began, in seconds."""
        self.decode: FloatArray = np.zeros(0)
        """Tokens that own requests are expected to generate in all."""
        self.decoding: FloatArray = np.zeros(0)
        """Own requests with a first token."""
        self.decoding_since: FloatArray = np.zeros(0)
        """The sum of the times of those first tokens, in seconds."""
        self.usual: BoolArray = np.zeros(0, np.bool_)
        self.last_resort: BoolArray = np.zeros(0, np.bool_)
        self._num_usual = 0

    def __len__(self) -> int:
        return len(self.reach)

    def grow(self) -> int:
        """Twice the slots; returns how many there are now."""
        size = max(FIRST_SIZE, 2 * len(self))
        for name, array in self._arrays():
            made = np.zeros(size, array.dtype)
            made[: len(array)] = array
            setattr(self, name, made)
        self.head_since[size // 2 if size > FIRST_SIZE else 0 :] = NEVER
        return size

    def clear(self, slot: int) -> None:
        """Make a slot one that no replica has."""
        for name, array in self._arrays():
            if name != "usual":
                array[slot] = 0
        self.head_since[slot] = NEVER
        self.reopen(slot)

    def reopen(self, slot: int) -> None:
        """Take in a change of a slot's reach, capacity or ongoing requests."""
        room, reach = bool(self.ongoing[slot] < self.capacity[slot]), self.reach[slot]
        usual = room and bool(reach == Reach.USUAL)
        self._num_usual += usual - int(self.usual[slot])
        self.usual[slot] = usual
        self.last_resort[slot] = room and bool(reach == Reach.LAST_RESORT)

    def open(self) -> BoolArray:
        """Which slots may be given a request now; not to be changed."""
        return self.usual if self._num_usual else self.last_resort

    def _arrays(self) -> list[tuple[str, AnyArray]]:
        return [(name, each) for name, each in vars(self).items() if isinstance(each, np.ndarray)]
