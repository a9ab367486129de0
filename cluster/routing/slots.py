"""One number of each replica in arrays: what a decision reads, written by ``Fleet``.

A slot is a replica's place in every array. A slot that no replica has is unreachable and idle.
What goes on as time passes is stored as the time when it ends, so that nothing has to be written
while nothing happens. Times and durations are in seconds.
"""

from enum import IntEnum

import numpy as np

from cluster.routing.arrays import AnyArray, BoolArray, FloatArray

FIRST_SIZE = 8


class Reach(IntEnum):
    """How a replica can be reached now."""

    NONE = 0
    LAST_RESORT = 1
    """Is given a request only where every ``USUAL`` replica is full."""
    USUAL = 2


class Slots:
    """The arrays; all have the same length."""

    def __init__(self) -> None:
        self.ongoing: FloatArray = np.zeros(0)
        """Requests of this router, and what other routers were last said to have there."""
        self.usual: BoolArray = np.zeros(0, np.bool_)
        """Has room and can be reached."""
        self.last_resort: BoolArray = np.zeros(0, np.bool_)
        """Has room and can be reached in another way."""
        self.busy: FloatArray = np.zeros(0)
        """1 where a request waits for its first token."""
        self.first_at: FloatArray = np.zeros(0)
        """When the first in line should have its first token; 0 where there is none."""
        self.behind_s: FloatArray = np.zeros(0)
        """What the prefill of those behind it takes."""
        self.decoding: FloatArray = np.zeros(0)
        """Streams of this router that had their first token."""
        self.decode_ends: FloatArray = np.zeros(0)
        """The sum of the times at which all streams should end, each had it begun at 0."""
        self.decode_least: FloatArray = np.zeros(0)
        """The least that the sum of what is left of them is taken for."""
        self.given_s: FloatArray = np.zeros(0)
        """Work that this router gave it, where what is long ago counts less."""
        self._num_usual = 0

    def __len__(self) -> int:
        return len(self.ongoing)

    def grow(self) -> int:
        """Twice the slots; returns how many there are now."""
        size = max(FIRST_SIZE, 2 * len(self))
        for name, array in self._arrays():
            made = np.zeros(size, array.dtype)
            made[: len(array)] = array
            setattr(self, name, made)
        return size

    def clear(self, slot: int) -> None:
        """Make a slot one that no replica has."""
        self.set_open(slot, False, Reach.NONE)
        for _, array in self._arrays():
            array[slot] = 0

    def set_open(self, slot: int, room: bool, reach: Reach) -> None:
        """Say whether a slot may be given a request."""
        usual = room and reach == Reach.USUAL
        self._num_usual += usual - int(self.usual[slot])
        self.usual[slot] = usual
        self.last_resort[slot] = room and reach == Reach.LAST_RESORT

    def open(self) -> BoolArray:
        """Which slots may be given a request now; not to be changed."""
        return self.usual if self._num_usual else self.last_resort

    def work_s(self, now_s: float, batch: float) -> FloatArray:
        """Seconds of prefill and decode before each slot, where ``batch`` streams go as one.

        The first in line counts for as much as it is overdue: a replica that gives no sign becomes
        less and less likely to be chosen.
        """
        waiting = np.abs(self.first_at - self.busy * now_s) + self.behind_s
        decoding = np.maximum(self.decode_ends - self.decoding * now_s, self.decode_least)
        work: FloatArray = waiting + decoding * (1.0 / batch)
        return work

    def _arrays(self) -> list[tuple[str, AnyArray]]:
        return [(name, each) for name, each in vars(self).items() if isinstance(each, np.ndarray)]
