"""Leases that let one replica of a pool be replaced at a time, without a coordinator.

Time is divided into periods. A replica gets a period's lease if it is the first to write the
period's key and the period before was not leased. A replica that drains renews its lease, so the
next replacement starts at least one period after its last renewal. Leases are not returned: a
replica that dies with its lease blocks nothing. Each leased period leaves one small key behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class KeyStore(Protocol):
    """Key-value store shared by all replicas."""

    def put_if_absent(self, key: str, value: str) -> bool:
        """Write atomically; return False if the key exists."""

    def has(self, key: str) -> bool:
        """Return True if the key exists."""


@dataclass(frozen=True, slots=True)
class ReplacementLease:
    """Lease for replacing a replica of one pool."""

    store: KeyStore
    pool: str
    period_s: float
    """Length of a period; must cover a start."""
    clock: Callable[[], float]
    """Unix time. Clocks of the replicas may differ by much less than a period."""

    def acquire(self, replica: str) -> bool:
        """Return True if the replica may be replaced now; if not, ask again later."""
        period = int(self.clock() // self.period_s)
        if self.store.has(self._key(period - 1)):
            return False
        return self.store.put_if_absent(self._key(period), replica)

    def renew(self, replica: str) -> None:
        """Keep an acquired lease; call this several times in a period."""
        self.store.put_if_absent(self._key(int(self.clock() // self.period_s)), replica)

    def _key(self, period: int) -> str:
        return f"replaced/{self.pool}/{period}"
