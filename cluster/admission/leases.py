"""Dividing every tenant's limits among the routers. Pure; how reports travel is not known here.

Each router leases a part of each limit and settles every second by a report to all others: what
each tenant asks of it, has open and took today. From the same reports every router computes the
same parts, so nobody leads and nothing is lost with a router but what it had not yet reported.

Bounds, for N routers: from equal reports the parts add up to the limit. While a demand moves, each
may take all of it for at most the whole, until the next report: N - 1 times what the rate gives in
one settlement (1 s) too much, once. Concurrency is rounded up, so N - 1 requests too many at most
when it is settled. A day's budget is exceeded by what all routers serve in one settlement, and by
what the requests of that time were underestimated.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

SETTLE_S = 1.0
"""How often routers report."""
STALE_S = 3.0
"""A peer that is silent for longer is taken to ask for as much as this router."""
FLOOR = 0.1
"""The part of each limit that is divided evenly, so that a router without demand can begin."""
_MEMORY_S = 5.0  # demand is what was asked for in the last seconds


class TenantReport(msgspec.Struct, frozen=True, array_like=True):
    """One tenant at one router."""

    demand: float = 0.0
    """Tokens a second that it asks for."""
    ongoing: int = 0
    day_tokens: float = 0.0
    served: dict[str, float] = {}
    """Tokens that each pool ever served it through this router."""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What one router tells the others."""

    router: str
    day: int
    """Of UTC, since 1970: which day ``day_tokens`` are of."""
    tenants: dict[str, TenantReport] = {}


@dataclass(frozen=True, slots=True)
class Lease:
    """One router's part of one tenant's limits, and what the others have given out."""

    share: float
    peers_ongoing: int
    peers_day_tokens: float


class Demand:
    """The rate at which a counter grows, over the last seconds."""

    __slots__ = ("_at_s", "_total", "rate")

    def __init__(self, total: float, now_s: float) -> None:
        self.rate = 0.0
        self._total = total
        self._at_s = now_s

    def update(self, total: float, now_s: float) -> float:
        """Take in the counter; a clock that stands or jumps back changes nothing."""
        elapsed_s = now_s - self._at_s
        if elapsed_s > 0:
            weight = min(1.0, elapsed_s / _MEMORY_S)
            self.rate += weight * ((total - self._total) / elapsed_s - self.rate)
            self._total, self._at_s = total, now_s
        elif elapsed_s < 0:
            self._at_s = now_s
        return self.rate


class Peers:
    """What this router knows of the others."""

    def __init__(self) -> None:
        self._routers: frozenset[str] = frozenset()
        self._reports: dict[str, tuple[Report, float]] = {}
        self._departed: dict[str, Report] = {}
        """The last words of routers that do not run any more, for what counts by the day."""

    def set_routers(self, others: Collection[str]) -> None:
        """Take the names of the other routers that run."""
        self._routers = frozenset(others)
        known = {**self._departed, **{name: said for name, (said, _) in self._reports.items()}}
        today = max((said.day for said in known.values()), default=0)
        self._departed = {
            name: said for name, said in known.items() if name not in others and said.day >= today
        }
        self._reports = {name: said for name, said in self._reports.items() if name in others}

    def receive(self, report: Report, now_s: float) -> dict[tuple[str, str], float]:
        """Take in a peer's report; returns what it served since its last one, by tenant and pool.

        A router that is not known to run is not heard; it reports again.
        """
        if report.router not in self._routers:
            return {}
        before = self._reports.get(report.router)
        self._reports[report.router] = report, now_s
        if before is None:
            return {}
        return {
            (name, pool): grown
            for name, tenant in report.tenants.items()
            for pool, total in tenant.served.items()
            if (grown := total - _served(before[0], name, pool)) > 0
        }

    def lease(self, tenant: str, own: TenantReport, day: int, now_s: float) -> Lease:
        """This router's part of a tenant's limits."""
        demands, ongoing, day_tokens = own.demand, 0, 0.0
        for name in self._routers:
            said = self._reports.get(name)
            theirs = said[0].tenants.get(tenant, TenantReport()) if said else None
            fresh = said is not None and 0 <= now_s - said[1] <= STALE_S
            demands += theirs.demand if theirs is not None and fresh else own.demand
            if said is not None and theirs is not None:
                ongoing += theirs.ongoing if fresh else 0
                day_tokens += theirs.day_tokens if said[0].day == day else 0.0
        for last in self._departed.values():
            if last.day == day and tenant in last.tenants:
                day_tokens += last.tenants[tenant].day_tokens
        even = 1 / (1 + len(self._routers))
        wanted = own.demand / demands if demands > 0 else even
        return Lease(FLOOR * even + (1 - FLOOR) * wanted, ongoing, day_tokens)


def _served(report: Report, tenant: str, pool: str) -> float:
    said: Mapping[str, TenantReport] = report.tenants
    return said[tenant].served.get(pool, 0.0) if tenant in said else 0.0
