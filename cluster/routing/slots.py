"""One number of each replica in arrays: what a decision reads, kept up to date by ``Fleet``.

A slot is a replica's place in every array. A slot that no replica has is unreachable and idle.
"""

from enum import IntEnum

import numpy as np

from cluster.routing.arrays import BoolArray, FloatArray

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
        self.prefill: FloatArray = np.zeros(0)
        """Tokens to be computed of own requests without a first token."""
        self.head: FloatArray = np.zeros(0)
        """Of ``prefill``, the tokens of the request that is first in line."""
        self.head_since: FloatArray = np.zeros(0)
        """When that one's prefill began, in seconds."""
        self.head_seen: FloatArray = np.zeros(0)
        """1 where its first token will be noted, so that one that is overdue says something."""
        self.decode: FloatArray = np.zeros(0)
        """Tokens that own requests are expected to generate in all."""
        self.decoding: FloatArray = np.zeros(0)
        """Own requests with a first token."""
        self.decoding_since: FloatArray = np.zeros(0)
        """The sum of the times of those first tokens, in seconds."""

    def __len__(self) -> int:
        return len(self.reach)

    def grow(self) -> int:
        """Twice the slots; returns how many there are now."""
        size = max(FIRST_SIZE, 2 * len(self))
        for name, array in vars(self).items():
            made = np.zeros(size)
            made[: len(array)] = array
            setattr(self, name, made)
        self.head_since[size // 2 if size > FIRST_SIZE else 0 :] = NEVER
        return size

    def clear(self, slot: int) -> None:
        """Make a slot one that no replica has."""
        for array in vars(self).values():
            array[slot] = 0.0
        self.head_since[slot] = NEVER

    def open(self) -> BoolArray:
        """Which slots may be given a request now."""
        room = self.ongoing < self.capacity
        usual: BoolArray = room & (self.reach == Reach.USUAL)
        if usual.any():
            return usual
        last: BoolArray = room & (self.reach == Reach.LAST_RESORT)
        return last
