"""Lets one replica of a pool be replaced at a time, without anybody in charge.

Time is cut into turns. Who writes a turn's key first has it, provided that nobody has the turn
before: so two of them begin at least one whole turn apart. Nothing has to be given back, so one
that dies with its turn blocks nobody. What stays is one small key for each replacement.
"""

from collections.abc import Callable
from typing import Protocol


class Keys(Protocol):
    """A store that all replicas share."""

    def put_if_absent(self, key: str, value: str) -> bool:
        """Write; False where the key is there already. Atomic."""

    def has(self, key: str) -> bool:
        """Whether the key is there."""


class Turns:
    """The turns of one pool.

    Args:
        keys: The store.
        pool: The pool's name.
        turn_s: The length of a turn: a drain and a start must fit in.
        clock: Unix time; the replicas' clocks may differ by much less than a turn.
    """

    def __init__(self, keys: Keys, pool: str, turn_s: float, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._pool = pool
        self._turn_s = turn_s
        self._clock = clock

    def take(self, replica: str) -> bool:
        """Whether it is the replica's turn now; asked again later where it is not."""
        turn = int(self._clock() // self._turn_s)
        if self._keys.has(self._key(turn - 1)):
            return False
        return self._keys.put_if_absent(self._key(turn), replica)

    def _key(self, turn: int) -> str:
        return f"replaced/{self._pool}/{turn}"
