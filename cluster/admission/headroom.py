"""Slots that a tenant with a backlog leaves to others. Pure.

In full engines, a request waits until another one ends, even if it is served next. So a tenant that
sends less than its share would wait for the requests of one that floods the pool. Once such tenants
have sent requests, the flooding one leaves them a few free slots: one, and the standard deviation
of the number of their requests if these arrive independently (its square root).
"""

from collections.abc import Callable
from math import isqrt

MAX_SHARE = 0.1
"""Largest share of the slots that stays free."""
MAX_BACKLOG = 3
"""Queued requests up to which a tenant has no backlog."""
RECENT_S = 5.0
"""Time for which slots stay free after the last request of a tenant without a backlog."""
_CACHED_S = 0.05  # a flood asks with each request, and there may be many tenants


class Headroom:
    """Requests in flight of one pool by tenant, and the slots that a tenant must leave free.

    Args:
        num_queued: Returns the number of a tenant's queued requests.
    """

    def __init__(self, num_queued: Callable[[str], int]) -> None:
        self._num_queued = num_queued
        self._in_flight: dict[str, int] = {}
        self._recent: dict[str, tuple[int, float]] = {}
        """Rank and time of each tenant's last request without a backlog; the oldest comes first."""
        self._cached: tuple[str, int, float, int] | None = None
        """Tenant, rank, time and result of ``num_wanted``."""

    def note_arrival(self, tenant: str, rank: int, now_s: float) -> None:
        """Note a request, before it is queued; ``rank`` is that of its priority class."""
        if self._has_backlog(tenant):
            return
        self._recent.pop(tenant, None)
        self._recent[tenant] = rank, now_s
        while now_s - next(iter(self._recent.values()))[1] >= RECENT_S:
            del self._recent[next(iter(self._recent))]

    def add_request(self, tenant: str) -> None:
        """Count a request that got a slot."""
        self._in_flight[tenant] = self._in_flight.get(tenant, 0) + 1

    def remove_request(self, tenant: str) -> None:
        """Remove a request that ended."""
        self._in_flight[tenant] -= 1
        if not self._in_flight[tenant]:
            del self._in_flight[tenant]

    def num_wanted(self, tenant: str, rank: int, now_s: float) -> int:
        """Return the number of slots that others would need from a tenant.

        Args:
            tenant: The tenant whose request could get a slot.
            rank: Rank of the request's class; lower classes wait for it in any case.
            now_s: Monotonic time.
        """
        if not self._has_backlog(tenant):
            return 0
        cached = self._cached
        if cached is None or cached[:2] != (tenant, rank) or now_s - cached[2] > _CACHED_S:
            cached = self._cached = tenant, rank, now_s, self._find_wanted(rank, now_s)
        return cached[3]

    def _find_wanted(self, rank: int, now_s: float) -> int:
        others = [
            name
            for name, (its_rank, at_s) in self._recent.items()
            if its_rank >= rank and now_s - at_s < RECENT_S and not self._has_backlog(name)
        ]
        in_flight = sum(self._in_flight.get(name, 0) for name in others)
        return 1 + isqrt(in_flight) if others else 0

    def _has_backlog(self, tenant: str) -> bool:
        return self._num_queued(tenant) > MAX_BACKLOG
