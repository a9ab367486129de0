"""Money budgets at one router: the spend of all routers, and refusals once a budget is spent.

Costs go to the usage file of this node within seconds, and the sums of all nodes are read back as
often, so a budget is overdrawn at most by the requests in flight and by what all routers serve in
that time.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from cluster.admission import Identity
from cluster.admission.budgets import (
    DAY_S,
    TENANT,
    Budget,
    BudgetState,
    Period,
    SpendRow,
    period_days,
)
from cluster.errors import OverloadedError, QuotaExhaustedError
from cluster.gateway.messages import Request, Response, bytes_response, require_operator
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.router_links import RouterLinks, fetch
from cluster.metrics import Registry, table
from cluster.periodic import Periodic

logger = logging.getLogger("ray.serve.tandem")

SPEND_PATH = "/v1/usage/spend"
"""Path on which routers query each other."""
REFRESH_S = 5.0
QUERY_TIMEOUT_S = 3.0
STATES: dict[BudgetState, int] = {"open": 0, "soft": 1, "spent": 2}


class _Spend(msgspec.Struct):
    """Answer to another router."""

    file: str
    """Id of the usage file; empty without one."""
    rows: list[SpendRow]


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Spend).decode


class Budgets:
    """Budgets of all tenants and keys.

    Args:
        account: Usage of this node; None: budgets have no effect.
        routers: Links to the other routers; None if there is only one.
        registry: Receives the gauges.
        list_identities: Returns all keys, with their tenants.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        account: UsageAccount | None,
        routers: RouterLinks | None,
        registry: Registry,
        list_identities: Callable[[], Iterable[Identity]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._account = account
        self._routers = routers
        self._registry = registry
        self._list_identities = list_identities
        self._clock = clock
        self._sums: dict[tuple[str, str], dict[int, float]] = {}
        # Costs by day, tenant and key that a reading of the file may not have found.
        self._recent: dict[tuple[int, str, str], float] = {}
        self._others: dict[str, list[SpendRow]] = {}  # of other nodes, by file
        self._reading: Periodic | None = None
        registry.on_collect(self._export)

    def start(self) -> None:
        """Read the spend now and periodically."""
        self._reading = Periodic("reading of budgets", 0.0, self._read)

    async def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            await self._reading.close()

    def add(self, identity: Identity, cost: float | None) -> None:
        """Charge a request that ended."""
        if not cost or self._account is None or not identity.tenant.name:
            return
        day = int(self._clock() // DAY_S)
        row = SpendRow(day, identity.tenant.name, identity.key, cost)
        self._account.add_spend(row)
        _add(self._recent, row)
        self._sum(row)

    def check(self, identity: Identity) -> None:
        """Admit a request.

        Raises:
            OverloadedError: The budget of its tenant or key is spent.
        """
        tenant = identity.tenant.name
        for key, period, limit in _limits(identity):
            spent = self.spent(tenant, key, period)
            if spent >= limit:
                self._registry.counter(table.LIMITS_HIT, tenant, f"cost_per_{period}").add()
                raise self._refusal(tenant, key, period, (spent, limit))

    def used(self, identity: Identity) -> float | None:
        """Return the used share of the most used budget of a tenant and key; None without one."""
        name = identity.tenant.name
        shares = (self.spent(name, key, per) / limit for key, per, limit in _limits(identity))
        return max(shares, default=None)

    def _refusal(
        self, tenant: str, key: str, period: Period, amounts: tuple[float, float]
    ) -> OverloadedError:
        now = self._clock()
        end_s = period_days(period, now)[1] * DAY_S
        whose = f"key {key} of tenant {tenant!r}" if key else f"tenant {tenant!r}"
        adjective = "daily" if period == "day" else "monthly"
        spent, limit = amounts
        currency = self._account.currency if self._account is not None else None
        return QuotaExhaustedError(
            f"The {adjective} budget of {whose} is spent: {spent:.4g} of {limit:g} "
            f"{currency or ''}. It renews at {_iso(end_s)}.".replace(" .", "."),
            retry_after_s=end_s - now,
        )

    def spent(self, tenant: str, key: str, period: Period) -> float:
        """Return the cost of a tenant, or of one of its keys, in the present period."""
        first, after = period_days(period, self._clock())
        days = self._sums.get((tenant, key), {})
        return sum(cost for day, cost in days.items() if first <= day < after)

    def report(self, tenant: str | None) -> list[dict[str, Any]]:
        """Return spend and budget of one tenant or all, for ``/v1/usage`` and the dashboard."""
        rows = []
        for name, key, budget in self._all():
            for period, limit in budget.limits() if tenant in (None, name) else ():
                spent = self.spent(name, key, period)
                rows.append(
                    {
                        "tenant": name,
                        "key": key or None,
                        "period": period,
                        "spent": spent,
                        "soft_limit": budget.soft_share * limit,
                        "limit": limit,
                        "state": budget.state(spent, limit),
                        "renews_at": _iso(period_days(period, self._clock())[1] * DAY_S),
                    }
                )
        return rows

    def _all(self) -> Iterator[tuple[str, str, Budget]]:
        tenants = {}
        for identity in self._list_identities():
            tenants[identity.tenant.name] = identity.tenant.budget
            if identity.budget.is_limited:
                yield identity.tenant.name, identity.key, identity.budget
        for name, budget in tenants.items():
            if budget.is_limited:
                yield name, TENANT, budget

    async def _read(self) -> None:
        if self._reading is not None:
            self._reading.period_s = REFRESH_S
        await self.refresh()

    async def refresh(self) -> None:
        """Read the spend of all nodes, if there is any budget; keep the last if that fails."""
        if self._account is None:
            return
        if not any(self._all()):
            self._recent, self._sums = {}, {}
            return
        first, _ = period_days("month", self._clock())
        written, self._recent = self._recent, {}
        try:
            stored = await self._account.find_spend(first)
        except BaseException:
            for key, cost in written.items():
                _add(self._recent, SpendRow(*key, cost))
            raise
        await self._read_others()
        others = [row for rows in self._others.values() for row in rows]
        recent = [SpendRow(*key, cost) for key, cost in self._recent.items()]
        self._sums = {}
        for row in (*stored, *others, *recent):
            self._sum(row)

    def _sum(self, row: SpendRow) -> None:
        for key in {TENANT, row.key}:
            days = self._sums.setdefault((row.tenant, key), defaultdict(float))
            days[row.day] += row.cost

    async def _read_others(self) -> None:
        links = list(self._routers.links().values()) if self._routers else []
        if not links or self._account is None:
            return
        answers = [fetch(link, SPEND_PATH, "", QUERY_TIMEOUT_S) for link in links]
        own = await self._account.file_id()
        for body in await asyncio.gather(*answers):
            if body is not None:
                spend = _decode(body)
                if spend.file != own:
                    self._others[spend.file] = spend.rows

    async def answer_router(self, request: Request) -> Response:
        """Answer another router with the spend in this node's file.

        Raises:
            PermissionDeniedError: The key may not see every tenant.
        """
        require_operator(request, SPEND_PATH)
        rows: list[SpendRow] = []
        file_id = ""
        if self._account is not None:
            first, _ = period_days("month", self._clock())
            rows, file_id = await self._account.find_spend(first), await self._account.file_id()
        return bytes_response(200, b"application/json", _encode(_Spend(file_id, rows)))

    def _export(self) -> None:
        for row in self.report(None):
            labels = row["tenant"], row["key"] or "", row["period"]
            gauge = self._registry.gauge
            gauge(table.BUDGET_SPENT, *labels).value = row["spent"] / row["limit"]
            gauge(table.BUDGET_STATE, *labels).value = STATES[row["state"]]


def _limits(identity: Identity) -> Iterator[tuple[str, Period, float]]:
    """Yield the key (``TENANT`` for all), period and amount of each budget that applies."""
    for key, budget in ((TENANT, identity.tenant.budget), (identity.key, identity.budget)):
        for period, limit in budget.limits():
            yield key, period, limit


def _add(costs: dict[tuple[int, str, str], float], row: SpendRow) -> None:
    key = row.day, row.tenant, row.key
    costs[key] = costs.get(key, 0.0) + row.cost


def _iso(utc_s: float) -> str:
    return datetime.fromtimestamp(utc_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
