"""Table of the numbers that a routing decision reads; ``Fleet`` writes it.

A row is a replica's index in every array. An unused row is closed and idle. Terms that change as
time passes are stored as absolute times, so nothing is written while nothing happens. Times and
durations are in seconds. The cost of a row at the time ``now_s`` is::

    cost_s = (head_s + behind_s + decode_weight * decode_left_s + excess_s
              + prompt_tokens * miss_s + closed_s)

    head_s = |head_due_s - has_head * now_s|
    decode_left_s = max(decode_end_sum_s - num_decoding * now_s, decode_floor_s)
    excess_s = min(max(assigned_s - share_s, 0), max_excess_s)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]
AnyArray = NDArray[Any]

INITIAL_ROWS = 8
_ARRAYS = ("in_flight", "usual", "last_resort", "hit_s", "_floors", "_state", "_terms")


class Reach(IntEnum):
    """Way in which a replica can be reached now."""

    NONE = 0
    LAST_RESORT = 1
    """Gets a request only if every ``USUAL`` replica is full."""
    USUAL = 2


class ReplicaTable:
    """Arrays of equal length; the terms of a cost are the lines of one matrix."""

    def __init__(self) -> None:
        self.in_flight: FloatArray = np.zeros(0)
        """Requests in flight: this router's, plus the other routers' at the last load report."""
        self.usual: BoolArray = np.zeros(0, np.bool_)
        """True if the row has room and ``Reach.USUAL``."""
        self.last_resort: BoolArray = np.zeros(0, np.bool_)
        """True if the row has room and ``Reach.LAST_RESORT``."""
        self.hit_s: FloatArray = np.zeros(0)
        """Seconds saved per prompt token that the replica claims to have cached."""
        self._floors: FloatArray = np.zeros((2, 0))
        self._state: FloatArray = np.zeros((6, 0))
        self._terms: FloatArray = np.zeros((6, 0))
        self._num_usual = 0
        # Maps each pair of lines of ``_state`` (a, b) to a - factor * b; see ``_compute_terms``.
        self._factors = np.kron(np.eye(3), (1.0, 0.0))
        self._weights = np.ones(6)
        self._bind_lines()

    def __len__(self) -> int:
        return len(self.in_flight)

    def grow(self) -> int:
        """Double the number of rows; return the new number."""
        size = max(INITIAL_ROWS, 2 * len(self))
        for name in _ARRAYS:
            old = getattr(self, name)
            new = np.zeros((*old.shape[:-1], size), old.dtype)
            new[..., : old.shape[-1]] = old
            setattr(self, name, new)
        self._bind_lines()
        self._update_closed()
        return size

    def clear_row(self, row: int) -> None:
        self.set_available(row, Reach.NONE)
        for name in _ARRAYS:
            getattr(self, name)[..., row] = 0
        self._ones[row] = 1.0
        self._closed_s[row] = np.inf

    def set_available(self, row: int, reach: Reach) -> None:
        """Set how a row can be reached; ``NONE`` if it has no room."""
        is_usual, had_usual = reach == Reach.USUAL, self._num_usual > 0
        self._num_usual += is_usual - int(self.usual[row])
        self.usual[row] = is_usual
        self.last_resort[row] = reach == Reach.LAST_RESORT
        if had_usual == (self._num_usual > 0):
            self._closed_s[row] = 0.0 if self.open_rows()[row] else np.inf
        else:  # every row of the last resort opens or closes
            self._update_closed()

    @contextmanager
    def hide_rows(self, rows: BoolArray) -> Iterator[None]:
        """Close these rows within the context; the table must not be changed there."""
        kept = self.usual, self.last_resort, self._num_usual
        self.usual, self.last_resort = self.usual & ~rows, self.last_resort & ~rows
        self._num_usual = int(np.count_nonzero(self.usual))
        self._update_closed()
        try:
            yield
        finally:
            self.usual, self.last_resort, self._num_usual = kept
            self._update_closed()

    def open_rows(self) -> BoolArray:
        """Return a mask of the rows that may be given a request now; read-only."""
        return self.usual if self._num_usual else self.last_resort

    def work_s(self, now_s: float, decode_weight: float) -> FloatArray:
        """Return the work of each row: ``head_s + behind_s + decode_weight * decode_left_s``."""
        self._compute_terms(now_s, np.inf)
        work: FloatArray = self._head_s + self.behind_s + self._decode_left_s * decode_weight
        return work

    def costs_s(
        self,
        now_s: float,
        decode_weight: float,
        prompt_tokens: float,
        share_s: float,
        max_excess_s: float,
    ) -> FloatArray:
        """Return the cost of each row (see the module's formula); inf if it is closed.

        ``decode_weight`` is the cost of a second that one stream still decodes. A row pays for
        assigned work above ``share_s``, at most ``max_excess_s``. No prompt token counts as cached.
        """
        self._compute_terms(now_s, share_s)
        np.minimum(self._excess_s, max_excess_s, out=self._excess_s)
        weights = self._weights
        weights[1], weights[4] = decode_weight, prompt_tokens
        costs: FloatArray = weights.dot(self._terms)
        return costs

    def _compute_terms(self, now_s: float, share_s: float) -> None:
        """Write ``head_s``, ``decode_left_s`` and ``excess_s`` (without its limit) of all rows."""
        # One matrix product replaces six passes over all rows.
        factors = self._factors
        factors[0, 1] = factors[1, 3] = -now_s
        factors[2, 5] = -share_s
        factors.dot(self._state, self._varying)
        # An overdue head costs its delay: a silent replica becomes less and less likely.
        np.abs(self._head_s, out=self._head_s)
        np.maximum(self._floored, self._floors, out=self._floored)

    def _update_closed(self) -> None:
        self._closed_s[:] = np.where(self.open_rows(), 0.0, np.inf)

    def _bind_lines(self) -> None:
        """Name the lines of the matrices, which are new arrays after ``grow``."""
        state, terms = self._state, self._terms
        self.head_due_s, self.has_head = state[:2]
        """Time at which the head of the queue should have its first token, and 1; 0 and 0 if the
        queue is empty."""
        self.decode_end_sum_s, self.num_decoding = state[2:4]
        """Expected decode time of this router's requests in flight, plus the times of the first
        tokens of those that decode; and how many decode."""
        self.assigned_s, self._ones = state[4:]
        """Work that this router assigned to the row; it decays with time."""
        self._ones[:] = 1.0
        self.decode_floor_s = self._floors[0]
        """Lower bound of ``decode_left_s``; the second line bounds ``excess_s`` by 0."""
        self._head_s, self._decode_left_s, self._excess_s = self._varying = terms[:3]
        self._floored = terms[1:3]
        self.behind_s, self.miss_s, self._closed_s = terms[3:]
        """Prefill time of the queue behind its head; prefill time of one token; inf if closed."""
