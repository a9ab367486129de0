"""Leases that let one replica of a pool be replaced at a time, without a coordinator.

Time is divided into periods. A replica gets a period's lease if it is the first to write the
period's key and the period before was not leased, so two replacements start at least one period
apart. Leases are not returned: a replica that dies with its lease blocks nothing. Each replacement
leaves one small key behind.
"""

from collections.abc import Callable
from typing import Protocol


class KeyStore(Protocol):
    """Key-value store shared by all replicas."""

    def put_if_absent(self, key: str, value: str) -> bool:
        """Write atomically; return False if the key exists."""

    def has(self, key: str) -> bool:
        """Return True if the key exists."""


class ReplacementLease:
    """Lease for replacing a replica of one pool.

    Args:
        store: Store shared by the replicas.
        pool: Name of the pool.
        period_s: Length of a period in seconds; must cover a drain and a start.
        clock: Unix time. Clocks of the replicas may differ by much less than a period.
    """

    def __init__(
        self, store: KeyStore, pool: str, period_s: float, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._pool = pool
        self._period_s = period_s
        self._clock = clock

    def acquire(self, replica: str) -> bool:
        """Return True if the replica may be replaced now; if not, ask again later."""
        period = int(self._clock() // self._period_s)
        if self._store.has(self._key(period - 1)):
            return False
        return self._store.put_if_absent(self._key(period), replica)

    def _key(self, period: int) -> str:
        return f"replaced/{self._pool}/{period}"
