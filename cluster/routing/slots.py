"""One number of each replica in arrays: what a decision reads, written by ``Fleet``.

A slot is a replica's place in every array. A slot that no replica has is unreachable and idle.
What goes on as time passes is stored as the time when it ends, so that nothing has to be written
while nothing happens. Times and durations are in seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np

from cluster.routing.arrays import BoolArray, FloatArray

FIRST_SIZE = 8
_ARRAYS = ("ongoing", "usual", "last_resort", "hit_s", "_least", "_known", "_costs")


class Reach(IntEnum):
    """How a replica can be reached now."""

    NONE = 0
    LAST_RESORT = 1
    """Is given a request only where every ``USUAL`` replica is full."""
    USUAL = 2


class Slots:
    """The arrays; all have the same length. What a decision adds up are rows of one table."""

    def __init__(self) -> None:
        self.ongoing: FloatArray = np.zeros(0)
        """Requests of this router, and what other routers were last said to have there."""
        self.usual: BoolArray = np.zeros(0, np.bool_)
        """Has room and can be reached."""
        self.last_resort: BoolArray = np.zeros(0, np.bool_)
        """Has room and can be reached in another way."""
        self.hit_s: FloatArray = np.zeros(0)
        """Seconds that it saves for a token that it is said to have cached."""
        self._least: FloatArray = np.zeros((2, 0))
        self._known: FloatArray = np.zeros((6, 0))
        self._costs: FloatArray = np.zeros((6, 0))
        self._num_usual = 0
        self._pass = np.kron(np.eye(3), (1.0, 0.0))  # of each pair of rows the difference
        self._weights = np.ones(6)
        self._name_rows()

    def __len__(self) -> int:
        return len(self.ongoing)

    def grow(self) -> int:
        """Twice the slots; returns how many there are now."""
        size = max(FIRST_SIZE, 2 * len(self))
        for name in _ARRAYS:
            array = getattr(self, name)
            made = np.zeros((*array.shape[:-1], size), array.dtype)
            made[..., : array.shape[-1]] = array
            setattr(self, name, made)
        self._name_rows()
        self._shut()
        return size

    def clear(self, slot: int) -> None:
        """Make a slot one that no replica has."""
        self.set_open(slot, False, Reach.NONE)
        for name in _ARRAYS:
            getattr(self, name)[..., slot] = 0
        self._ones[slot] = 1.0
        self._shut_s[slot] = np.inf

    def set_open(self, slot: int, room: bool, reach: Reach) -> None:
        """Say whether a slot may be given a request."""
        usual, had_usual = room and reach == Reach.USUAL, self._num_usual > 0
        self._num_usual += usual - int(self.usual[slot])
        self.usual[slot] = usual
        self.last_resort[slot] = room and reach == Reach.LAST_RESORT
        if had_usual == (self._num_usual > 0):
            self._shut_s[slot] = 0.0 if self.open()[slot] else np.inf
        else:
            self._shut()

    @contextmanager
    def hidden(self, slots: BoolArray) -> Iterator[None]:
        """Have these slots shut meanwhile; nothing may change there."""
        kept = self.usual, self.last_resort, self._num_usual
        self.usual, self.last_resort = self.usual & ~slots, self.last_resort & ~slots
        self._num_usual = int(np.count_nonzero(self.usual))
        self._shut()
        try:
            yield
        finally:
            self.usual, self.last_resort, self._num_usual = kept
            self._shut()

    def open(self) -> BoolArray:
        """Which slots may be given a request now; not to be changed."""
        return self.usual if self._num_usual else self.last_resort

    def work_s(self, now_s: float, decode_weight: float) -> FloatArray:
        """Seconds of prefill and decode before each slot.

        The first in line counts for as much as it is overdue: a replica that gives no sign becomes
        less and less likely to be chosen.
        """
        self._leave(now_s, np.inf)
        work: FloatArray = self._waiting + self.behind_s + self._decoding_left * decode_weight
        return work

    def costs_s(
        self,
        now_s: float,
        decode_weight: float,
        prompt_tokens: float,
        share_s: float,
        most_s: float,
    ) -> FloatArray:
        """The same, with more that counts against a slot; inf for one that is not open.

        Args:
            now_s: The time.
            decode_weight: What a second of one stream counts.
            prompt_tokens: Whose prefill is added.
            share_s: Of the work that a slot was given, what is above that is added,
            most_s: but never more than that.
        """
        self._leave(now_s, share_s)
        np.minimum(self._over, most_s, out=self._over)
        weights = self._weights
        weights[1], weights[4] = decode_weight, prompt_tokens
        costs: FloatArray = weights.dot(self._costs)
        return costs

    def _leave(self, now_s: float, share_s: float) -> None:
        """Write what is left now of the first in line and of decoding, and what was too much.

        One product of matrices does what would be six passes over all slots.
        """
        factors = self._pass
        factors[0, 1] = factors[1, 3] = -now_s
        factors[2, 5] = -share_s
        factors.dot(self._known, self._left)
        np.abs(self._waiting, out=self._waiting)
        np.maximum(self._bounded, self._least, out=self._bounded)

    def _shut(self) -> None:
        self._shut_s[:] = np.where(self.open(), 0.0, np.inf)

    def _name_rows(self) -> None:
        """Find the rows of the tables, which are elsewhere once they have grown."""
        known, costs = self._known, self._costs
        self.first_at, self.busy = known[:2]
        """When the first in line should have its first token, and 1; 0 where there is none."""
        self.decode_ends, self.decoding = known[2:4]
        """The sum of the times at which all streams should end, each had it begun at 0, and how
        many had their first token, of those of this router."""
        self.given_s, self._ones = known[4:]
        """Work that this router gave it, where what is long ago counts less."""
        self._ones[:] = 1.0
        self.decode_least = self._least[0]
        """The least that the sum of what is left of its streams is taken for."""
        self._waiting, self._decoding_left, self._over = self._left = costs[:3]
        self._bounded = costs[1:3]
        self.behind_s, self.miss_s, self._shut_s = costs[3:]
        """What the prefill of those behind the first in line takes; what a prompt token takes; inf
        where a slot is not open."""
