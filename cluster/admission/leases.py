"""Division of every tenant's limits among the routers. Pure; the transport is the caller's.

Each router leases a share of each limit. Once a second (a settlement) it reports to all others what
each tenant requests of it, has in flight there and used today. All routers compute the same shares
from the same reports, so there is no leader, and a crashed router loses only what it had not yet
reported.

Bounds for N routers: with equal reports, the shares add up to the limit. While demand moves, each
router may take the whole demand as its own until the next report: that exceeds a rate once by at
most N - 1 times its amount per settlement. Concurrency is rounded up, so at most N - 1 requests too
many are admitted. A daily budget is exceeded by at most what all routers serve in one settlement,
plus the underestimates of the requests of that time.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

SETTLE_S = 1.0
"""Interval of the routers' reports."""
STALE_S = 3.0
"""Silence after which a peer is assumed to have the same demand as this router."""
EVEN_SHARE = 0.1
"""Part of each limit that is divided evenly, so that a router without demand can start."""
_DEMAND_WINDOW_S = 5.0  # time constant of the demand


class TenantReport(msgspec.Struct, frozen=True, array_like=True):
    """State of one tenant at one router."""

    demand: float = 0.0
    """Requested tokens/s."""
    concurrent: int = 0
    """Requests at this moment."""
    day_tokens: float = 0.0
    """Tokens used today."""
    served: dict[str, float] = {}
    """Tokens that each pool ever served to the tenant through this router."""


_NO_REPORT = TenantReport()


class QuotaReport(msgspec.Struct, frozen=True, array_like=True):
    """Report of one router to the others."""

    router: str
    day: int
    """Day of ``day_tokens``: days since 1970 in UTC."""
    tenants: dict[str, TenantReport] = {}


@dataclass(frozen=True, slots=True)
class Lease:
    """One router's share of one tenant's limits, and what the other routers have given out."""

    share: float
    """Between 0 and 1."""
    peers_concurrent: int
    peers_day_tokens: float


class Demand:
    """Rate at which a counter grows, as an exponential mean over some seconds."""

    __slots__ = ("_total", "_updated_s", "rate")

    def __init__(self, total: float, now_s: float) -> None:
        self.rate = 0.0
        self._total = total
        self._updated_s = now_s

    def update(self, total: float, now_s: float) -> float:
        """Return the rate after a new reading; a clock that jumps back changes nothing."""
        elapsed_s = now_s - self._updated_s
        if elapsed_s > 0:
            weight = min(1.0, elapsed_s / _DEMAND_WINDOW_S)
            self.rate += weight * ((total - self._total) / elapsed_s - self.rate)
            self._total, self._updated_s = total, now_s
        elif elapsed_s < 0:
            self._updated_s = now_s
        return self.rate


class _Received(NamedTuple):
    report: QuotaReport
    at_s: float


class PeerReports:
    """Latest reports of the other routers."""

    def __init__(self) -> None:
        self._routers: frozenset[str] = frozenset()
        self._received: dict[str, _Received] = {}
        # Last reports of routers that are gone, for the daily budget.
        self._departed: dict[str, QuotaReport] = {}

    def set_routers(self, others: Collection[str]) -> None:
        """Set the names of the other running routers."""
        self._routers = frozenset(others)
        known = self._departed | {name: each.report for name, each in self._received.items()}
        today = max((report.day for report in known.values()), default=0)
        self._departed = {
            name: report
            for name, report in known.items()
            if name not in others and report.day >= today
        }
        self._received = {name: each for name, each in self._received.items() if name in others}

    def add_report(self, report: QuotaReport, now_s: float) -> dict[tuple[str, str], float]:
        """Store a peer's report.

        Reports of routers that are not known to run are ignored; they report again.

        Returns:
            The tokens that the peer served since its previous report, by tenant and pool.
        """
        if report.router not in self._routers:
            return {}
        before = self._received.get(report.router)
        self._received[report.router] = _Received(report, now_s)
        if before is None:
            return {}
        return {
            (name, pool): grown
            for name, tenant in report.tenants.items()
            for pool, total in tenant.served.items()
            if (grown := total - _served_tokens(before.report, name, pool)) > 0
        }

    def num_concurrent(self, now_s: float) -> int:
        """Return the requests of all tenants at the other routers."""
        return sum(
            tenant.concurrent
            for received in self._received.values()
            if 0 <= now_s - received.at_s <= STALE_S
            for tenant in received.report.tenants.values()
        )

    def lease_for(self, tenant: str, own: TenantReport, day: int, now_s: float) -> Lease:
        """Return this router's share of a tenant's limits.

        Args:
            tenant: Name of the tenant.
            own: The tenant's state at this router.
            day: Today, as in ``QuotaReport``.
            now_s: Current time.
        """
        demands, concurrent, day_tokens = own.demand, 0, 0.0
        for name in self._routers:
            received = self._received.get(name)
            theirs, is_fresh = _NO_REPORT, False
            if received is not None:
                theirs = received.report.tenants.get(tenant, _NO_REPORT)
                is_fresh = 0 <= now_s - received.at_s <= STALE_S
                day_tokens += theirs.day_tokens if received.report.day == day else 0.0
            demands += theirs.demand if is_fresh else own.demand
            concurrent += theirs.concurrent if is_fresh else 0
        for report in self._departed.values():
            if report.day == day and tenant in report.tenants:
                day_tokens += report.tenants[tenant].day_tokens
        even = 1 / (1 + len(self._routers))
        by_demand = own.demand / demands if demands > 0 else even
        return Lease(EVEN_SHARE * even + (1 - EVEN_SHARE) * by_demand, concurrent, day_tokens)


def _served_tokens(report: QuotaReport, tenant: str, pool: str) -> float:
    return report.tenants[tenant].served.get(pool, 0.0) if tenant in report.tenants else 0.0
