"""Dashboard of one router: samples every second, and merges the other routers' reports on request.

While no client asks, no other router is queried and no row is computed.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import msgspec

from cluster.autoscaling import TargetChange
from cluster.errors import InvalidRequestError
from cluster.gateway.messages import Request, Response, bytes_response, require_operator
from cluster.gateway.pools.pool import Pool
from cluster.gateway.recording.observer import RequestSinks
from cluster.gateway.recording.request_log import Failure
from cluster.gateway.recording.tenant_seconds import MAX_TENANTS
from cluster.gateway.reporting.dashboard.board import (
    ALL,
    COLUMNS,
    WINDOW_S,
    Board,
    level_values,
    sum_levels,
)
from cluster.gateway.reporting.dashboard.history import History
from cluster.gateway.reporting.dashboard.report import PoolNow, RouterReport
from cluster.gateway.router_links import RouterLinks, fetch
from cluster.link import LinkClient
from cluster.routing.breaker import CircuitState

logger = logging.getLogger("ray.serve.tandem")

DATA_PATH = "/dashboard/data"
"""Path of the page's data."""
REPORT_PATH = "/dashboard/report"
"""Path on which routers query each other."""
QUERY_TIMEOUT_S = 1.0
MAX_LAG_S = 1
"""Longest time by which another router may end a second later than this one."""
MAX_FAILURES = 50
MAX_DECISIONS = 20
DECISIONS_INTERVAL_S = 2.0
"""Interval at which autoscaling decides, and at which its decisions are read."""
REFRESH_INTERVAL_S = 0.5
"""Shortest interval between two computations of rows, independent of the number of viewers."""
SINGLE_ROUTER_ID = "router"
_ROWS_PER_PAUSE = 10  # take about 1 ms; then other tasks of the event loop run

ReadDecisions = Callable[[], Awaitable[list[TargetChange] | None]]
"""Returns the last changes of replica targets; None if they are unknown."""

_CIRCUITS: tuple[CircuitState, ...] = ("closed", "half_open", "open")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(RouterReport).decode


@dataclass(frozen=True, slots=True)
class _TenantBoard:
    """Rows of one tenant, computed once for all its viewers."""

    board: Board
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Dashboard:
    """Data of one router's dashboard.

    Args:
        pools: Pools of this router.
        sinks: Its metrics, request log and tenants' requests.
        routers: Links to the other routers; None if there is only one.
        read_decisions: Reads autoscaling's decisions; None if there is no autoscaling.
        read_budgets: Returns spend and budgets of one tenant or all.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        sinks: RequestSinks,
        routers: RouterLinks | None,
        read_decisions: ReadDecisions | None = None,
        read_budgets: Callable[[str | None], list[dict[str, Any]]] | None = None,
    ) -> None:
        self._history = History(sinks.registry, pools, sinks.tenants)
        self._pools = pools
        self._board = Board(pools)
        self._tenant_boards: dict[str, _TenantBoard] = {}
        self._log = sinks.log
        self._routers = routers
        self._others: dict[str, RouterReport | None] = {}
        self._read_decisions = read_decisions
        self._read_budgets = read_budgets
        self._decisions: list[TargetChange] | None = None
        self._decisions_at = -DECISIONS_INTERVAL_S
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf
        self._sampling = asyncio.create_task(self._sample())

    async def close(self) -> None:
        """Stop the tasks."""
        tasks = [task for task in (self._sampling, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def report(self, request: Request) -> Response:
        """Answer another router with the report of this one.

        Raises:
            PermissionDeniedError: The key may not see the figures of every tenant.
        """
        require_operator(request, REPORT_PATH)
        return _json(self._report(_since(request)))

    async def data(self, request: Request) -> Response:
        """Answer with the last minutes of all routers, after ``since`` (Unix time) if given.

        A tenant sees its own requests and failures only.
        """
        since = _since(request)
        own = None if request.identity.sees_all else self._tenant_board(request.tenant)
        if self._refreshing is None and time.monotonic() >= self._refreshed_at + REFRESH_INTERVAL_S:
            self._refreshing = asyncio.create_task(self._refresh())
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        if own is None:
            return _json(self._data(since, self._board))
        await self._add_tenant_rows(request.tenant, own)
        return _json(_own_part(self._data(since, own.board), request.tenant))

    def _tenant_board(self, tenant: str) -> "_TenantBoard":
        """Return the rows of a tenant, which are kept while it watches."""
        boards = self._tenant_boards
        found = boards.pop(tenant, None) or _TenantBoard(Board(self._pools))
        boards[tenant] = found  # the last in the order of use
        if len(boards) > MAX_TENANTS:
            del boards[next(iter(boards))]
        return found

    async def _add_tenant_rows(self, tenant: str, own: "_TenantBoard") -> None:
        async with own.lock:
            own.board.restart_if_set_back(self._board.last)
            seconds = self._board.seconds_of(tenant, own.board.last)
            for number, _ in enumerate(own.board.add_rows([seconds], self._board.last), 1):
                if number % _ROWS_PER_PAUSE == 0:
                    await asyncio.sleep(0)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1.005 - time.time() % 1)  # just after the next whole second
            try:
                self._history.sample(time.time(), time.monotonic())
            except Exception:  # losing one second must not stop the sampling
                logger.exception("Sampling the dashboard failed; one second is missing.")

    def _report(self, since: int) -> RouterReport:
        return RouterReport(
            router=SINGLE_ROUTER_ID if self._routers is None else self._routers.own_id,
            seconds=self._history.since(since),
            pools=self._history.now(),
            failures=self._log.failures,
            changes=self._history.changes,
        )

    async def _refresh(self) -> None:
        try:
            own = self._history.since(0)
            newest = own[-1].time if own else 0
            self._board.restart_if_set_back(newest)
            links = {} if self._routers is None else dict(self._routers.links())
            queries = [_query(link, self._board.last) for link in links.values()]
            reports, _ = await asyncio.gather(asyncio.gather(*queries), self._update_decisions())
            self._others = dict(zip(links, reports, strict=True))
            others = [report.seconds for report in reports if report is not None]
            until = newest - MAX_LAG_S if links else newest
            for number, _ in enumerate(self._board.add_rows([own, *others], until), 1):
                if number % _ROWS_PER_PAUSE == 0:
                    await asyncio.sleep(0)
        except Exception:  # a defect; the previous rows are shown
            logger.exception("Refreshing the dashboard failed.")
        finally:
            self._refreshing, self._refreshed_at = None, time.monotonic()

    async def _update_decisions(self) -> None:
        now = time.monotonic()
        if self._read_decisions is None or now < self._decisions_at + DECISIONS_INTERVAL_S:
            return
        self._decisions_at = now
        changes = await self._read_decisions()
        newest_first = None if changes is None else sorted(changes, key=lambda change: -change.time)
        self._decisions = newest_first and newest_first[:MAX_DECISIONS]

    def _data(self, since: int, board: Board) -> dict[str, Any]:
        own = self._report(self._board.last)
        reports = [own, *(other for other in self._others.values() if other is not None)]
        rows = board.since(since)
        pools = _merge_pools(reports)
        return {
            "now": time.time(),
            "router": own.router,
            "routers": {
                own.router: True,
                **{name: other is not None for name, other in self._others.items()},
            },
            "window_s": WINDOW_S,
            "columns": COLUMNS,
            "times": [row.time for row in rows],
            "rows": {name: [row.pools[name] for row in rows] for name in (ALL, *own.pools)},
            "pools": pools,
            "levels": _levels(pools),
            "failures": _last_failures(reports),
            "changes": own.changes,
            "decisions": self._decisions,
            "budgets": [] if self._read_budgets is None else self._read_budgets(None),
        }


async def _query(link: LinkClient, since: int) -> RouterReport | None:
    """Return another router's report; None if it does not answer."""
    body = await fetch(link, REPORT_PATH, f"since={since}", QUERY_TIMEOUT_S)
    try:
        return None if body is None else _decode(body)
    except msgspec.DecodeError:
        return None


def _merge_pools(reports: list[RouterReport]) -> dict[str, PoolNow]:
    """Return the first router's pools with the requests of all routers."""
    first, *others = reports
    for other in others:
        for name, pool in first.pools.items():
            if (other_pool := other.pools.get(name)) is None:
                continue
            pool.queued += other_pool.queued
            by_id = {replica.id: replica for replica in other_pool.replicas}
            for replica in pool.replicas:
                if (same := by_id.get(replica.id)) is not None:
                    replica.in_flight += same.in_flight
                    replica.circuit = max(replica.circuit, same.circuit, key=_CIRCUITS.index)
                    replica.is_draining |= same.is_draining
    return first.pools


def _levels(pools: Mapping[str, PoolNow]) -> dict[str, dict[str, float]]:
    """Return the current levels of each pool and of ``ALL``, consistent with its replicas."""
    levels = {name: pool.level() for name, pool in pools.items()}
    levels[ALL] = sum_levels(levels)
    return {name: level_values(level) for name, level in levels.items()}


def _own_part(data: dict[str, Any], tenant: str) -> dict[str, Any]:
    """Return the part of the data that a tenant may see, in the same format."""
    pools = {name: PoolNow(pool.kind, []) for name, pool in data["pools"].items()}
    own = [failure for failure in data["failures"] if failure.tenant == tenant]
    shown = {"pools": pools, "levels": _levels(pools), "failures": own, "tenant": tenant}
    routers = {data["router"]: True}
    budgets = [budget for budget in data["budgets"] if budget["tenant"] == tenant]
    hidden: dict[str, Any] = {"changes": [], "decisions": None}
    return {**data, **shown, **hidden, "routers": routers, "budgets": budgets}


def _last_failures(reports: list[RouterReport]) -> list[Failure]:
    """Return the last failures of all routers, newest first."""
    failures = [failure for report in reports for failure in report.failures]
    return sorted(failures, key=lambda failure: -failure.time)[:MAX_FAILURES]


def _since(request: Request) -> int:
    value = parse_qs(request.query.decode("latin-1")).get("since", ["0"])[-1]
    if not (value.isascii() and value.isdigit() and len(value) <= 12):
        raise InvalidRequestError("since must be a Unix time in whole seconds", param="since")
    return int(value)


def _json(body: Any) -> Response:
    return bytes_response(
        200, b"application/json", _encode(body), [(b"cache-control", b"no-store")]
    )
