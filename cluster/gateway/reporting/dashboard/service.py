"""The dashboard's data: samples this router every second, and adds the others' up when asked.

Owns the sampling task. Nothing is asked of other routers, and no row is made, while nobody looks.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

import msgspec

from cluster.autoscaling import TargetChange
from cluster.errors import InvalidRequestError, LinkError, RequestError
from cluster.gateway.messages import Request, Response, bytes_response
from cluster.gateway.pools.pool import Pool
from cluster.gateway.recording.request_log import Failure, RequestLog
from cluster.gateway.reporting.dashboard.board import (
    ALL,
    COLUMNS,
    LEVELS,
    WINDOW_S,
    Board,
    level_of_all,
)
from cluster.gateway.reporting.dashboard.history import History
from cluster.gateway.reporting.dashboard.report import PoolNow, Report
from cluster.gateway.router_links import RouterLinks
from cluster.link import LinkClient, RequestHead
from cluster.metrics import Registry

logger = logging.getLogger("ray.serve.tandem")

DATA_PATH = "/dashboard/data"
REPORT_PATH = "/dashboard/report"
"""Where routers ask each other."""
ASK_TIMEOUT_S = 1.0
LATE_S = 1
"""How much later than this router another one may end a second."""
MAX_FAILURES = 50
MAX_DECISIONS = 20
DECISIONS_S = 2.0
"""Autoscaling decides as often as this."""
REFRESH_S = 0.5
"""However many look, rows are not made more often than this."""
ALONE = "router"
_ROWS_AT_ONCE = 10
"""Made in about a millisecond; then the streams have their turn."""

ReadDecisions = Callable[[], Awaitable[list[TargetChange] | None]]
"""Gives the last changes of targets; None where it is not known whether there were any."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Report).decode


class Dashboard:
    """What the page of one router shows.

    Args:
        registry: What this router counts.
        pools: Its pools.
        journal: Which requests failed.
        routers: The other routers; None: it is alone.
        read_decisions: What autoscaling decided; None: there is none.
    """

    def __init__(
        self,
        registry: Registry,
        pools: Mapping[str, Pool],
        journal: RequestLog,
        routers: RouterLinks | None,
        read_decisions: ReadDecisions | None = None,
    ) -> None:
        self._history = History(registry, pools)
        self._board = Board(pools)
        self._journal = journal
        self._routers = routers
        self._others: dict[str, Report | None] = {}
        self._read_decisions = read_decisions
        self._decisions: list[TargetChange] | None = None
        self._decisions_at = -DECISIONS_S
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -math.inf
        self._sampling = asyncio.create_task(self._sample())

    async def close(self) -> None:
        """End what is under way."""
        tasks = [task for task in (self._sampling, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def report(self, request: Request) -> Response:
        """What this router alone has to tell, for another one."""
        return _json(self._report(_since(request)))

    async def data(self, request: Request) -> Response:
        """All routers' last minutes, after ``since`` (Unix time) where that is given."""
        since = _since(request)
        if self._refreshing is None and time.monotonic() >= self._refreshed_at + REFRESH_S:
            self._refreshing = asyncio.create_task(self._refresh())
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        return _json(self._data(since))

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(1.005 - time.time() % 1)  # the next whole second has begun
            try:
                self._history.take(time.time(), time.monotonic())
            except Exception:  # a second less must not cost the others
                logger.exception("a second of the dashboard is lost")

    def _report(self, since: int) -> Report:
        return Report(
            router=self._own_id,
            seconds=self._history.since(since),
            pools=self._history.now(),
            failures=self._journal.failures,
            changes=self._history.changes,
        )

    @property
    def _own_id(self) -> str:
        return ALONE if self._routers is None else self._routers.own_id

    async def _refresh(self) -> None:
        try:
            own = self._history.since(0)
            newest = own[-1].time if own else 0
            self._board.restart_if_set_back(newest)
            links = {} if self._routers is None else dict(self._routers.links())
            asked = [_ask(link, self._board.last) for link in links.values()]
            answers, _ = await asyncio.gather(asyncio.gather(*asked), self._learn_decisions())
            self._others = dict(zip(links, answers, strict=True))
            others = [other.seconds for other in self._others.values() if other is not None]
            until = newest - LATE_S if links else newest
            for number, _ in enumerate(self._board.add([own, *others], until), 1):
                if number % _ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except Exception:  # a defect; what is known is shown
            logger.exception("the dashboard's figures could not be made")
        finally:
            self._refreshing, self._refreshed_at = None, time.monotonic()

    async def _learn_decisions(self) -> None:
        now = time.monotonic()
        if self._read_decisions is None or now < self._decisions_at + DECISIONS_S:
            return
        self._decisions_at = now
        found = await self._read_decisions()
        newest_first = None if found is None else sorted(found, key=lambda change: -change.time)
        self._decisions = newest_first and newest_first[:MAX_DECISIONS]

    def _data(self, since: int) -> dict[str, Any]:
        own = self._report(self._board.last)
        answered = [own, *(other for other in self._others.values() if other is not None)]
        rows = self._board.since(since)
        pools = _pools_of_all(answered)
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
            "rows": {name: [row.pools[name] for row in rows] for name in ("", *own.pools)},
            "pools": pools,
            "levels": _levels(pools),
            "failures": _failures_of_all(answered),
            "changes": own.changes,
            "decisions": self._decisions,
        }


async def _ask(link: LinkClient, since: int) -> Report | None:
    """What another router tells; None where it does not answer now."""
    head = RequestHead(method="GET", path=REPORT_PATH, query_string=f"since={since}".encode())
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            stream = link.open(head)
            try:
                answer = await stream.head()
                body = b""
                while chunk := await stream.read():
                    body += chunk
            finally:
                stream.cancel()
        return _decode(body) if answer.status == 200 else None
    except (LinkError, RequestError, TimeoutError, msgspec.DecodeError):
        return None


def _pools_of_all(reports: list[Report]) -> dict[str, PoolNow]:
    """The first router's pools, with the requests of all routers in each replica."""
    first, *others = reports
    for other in others:
        for name, pool in first.pools.items():
            if (theirs := other.pools.get(name)) is None:
                continue
            pool.queued += theirs.queued
            by_id = {replica.id: replica for replica in theirs.replicas}
            for replica in pool.replicas:
                if (same := by_id.get(replica.id)) is not None:
                    replica.ongoing += same.ongoing
    return first.pools


def _levels(pools: Mapping[str, PoolNow]) -> dict[str, dict[str, float]]:
    """What is so now, of each pool and of ``ALL``: of the same moment as the replicas."""
    levels = {name: pool.level() for name, pool in pools.items()}
    levels[ALL] = level_of_all(levels)
    return {
        name: {key: round(getattr(level, key), 4) for key in LEVELS}
        for name, level in levels.items()
    }


def _failures_of_all(reports: list[Report]) -> list[Failure]:
    """The last ones, the newest first."""
    failures = [failure for report in reports for failure in report.failures]
    return sorted(failures, key=lambda failure: -failure.time)[:MAX_FAILURES]


def _since(request: Request) -> int:
    given = parse_qs(request.query.decode("latin-1")).get("since", ["0"])[-1]
    if not (given.isascii() and given.isdigit() and len(given) <= 12):
        raise InvalidRequestError("since must be a Unix time in whole seconds", param="since")
    return int(given)


def _json(body: Any) -> Response:
    return bytes_response(
        200, b"application/json", _encode(body), [(b"cache-control", b"no-store")]
    )
