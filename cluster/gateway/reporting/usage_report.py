"""``GET /v1/usage``: the hourly sums of all nodes.

Nodes without a router, such as lost ones, count with the copies that others have of their sums.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import urlencode

import msgspec

from cluster.accounting.usage import (
    UsageKey,
    UsageRow,
    UsageSums,
    as_csv,
    as_json,
    merge_rows,
    parse_time,
)
from cluster.admission import Identity
from cluster.errors import InvalidRequestError, PermissionDeniedError, UnavailableError
from cluster.gateway.messages import (
    Request,
    Response,
    bytes_response,
    json_response,
    query_of,
    require_operator,
)
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.router_links import RouterLinks, fetch

DAY_S = 24 * 3600.0
ROWS_PATH = "/v1/usage/rows"
COPIES_PATH = "/v1/usage/copies"
"""Paths on which routers query each other."""
QUERY_TIMEOUT_S = 5.0

_PARAMETERS = ("start", "end", "tenant", "format")
_encode = msgspec.json.Encoder().encode
decode_rows = msgspec.json.Decoder(tuple[str, list[UsageRow]]).decode
_decode_copies = msgspec.json.Decoder(list[tuple[str, UsageRow]]).decode


class BudgetReport(Protocol):
    """Spend and budgets of tenants; ``admission.budgets`` implements it."""

    def report(self, tenant: str | None) -> list[dict[str, Any]]:
        """Return the rows of one tenant or all."""

    async def answer_router(self, request: Request) -> Response:
        """Answer another router."""


class UsageReport:
    """Usage of all nodes; routers of one node share a file, which counts once.

    Args:
        account: Usage of this node.
        routers: Links to the other routers; None if there is only one.
        budgets: Budgets to show with the usage.
    """

    def __init__(
        self, account: UsageAccount, routers: RouterLinks | None, budgets: BudgetReport
    ) -> None:
        self._account = account
        self._routers = routers
        self.budgets = budgets

    async def handle(self, request: Request) -> Response:
        """Answer ``GET /v1/usage``.

        Raises:
            InvalidRequestError: A query parameter is invalid.
            PermissionDeniedError: The key may not read the usage of the requested tenant.
        """
        query = _query(request)
        end_s = parse_time(query["end"], "end") if "end" in query else self._account.clock()
        start_s = parse_time(query["start"], "start") if "start" in query else end_s - DAY_S
        if not start_s < end_s:
            raise InvalidRequestError("start must be before end", param="start")
        format_ = query.get("format", "json")
        if format_ not in ("json", "csv"):
            raise InvalidRequestError(
                f"format: got {format_[:40]!r}; allowed: json, csv", param="format"
            )
        tenant = _visible_tenant(request.identity, query.get("tenant"))
        rows = await self._find_everywhere(start_s, end_s, tenant)
        if format_ == "csv":
            return bytes_response(200, b"text/csv; charset=utf-8", as_csv(rows).encode())
        body = as_json(rows, self._account.currency)
        return json_response({**body, "budgets": self.budgets.report(tenant)})

    async def answer_router(self, request: Request) -> Response:
        """Answer another router with this node's file.

        Raises:
            PermissionDeniedError: The key may not see the usage of every tenant.
        """
        rows = await self._account.find(*_router_query(request, ROWS_PATH))
        body = _encode((await self._account.file_id(), rows))
        return bytes_response(200, b"application/json", body)

    async def answer_router_with_copies(self, request: Request) -> Response:
        """Answer another router with the copies that this node has.

        Raises:
            PermissionDeniedError: The key may not see the usage of every tenant.
        """
        copies = await self._account.find_copies(*_router_query(request, COPIES_PATH))
        return bytes_response(200, b"application/json", _encode(copies))

    async def _find_everywhere(
        self, start_s: float, end_s: float, tenant: str | None
    ) -> list[UsageRow]:
        """Return the sums of all nodes."""
        files = {await self._account.file_id(): await self._account.find(start_s, end_s, tenant)}
        copies = await self._account.find_copies(start_s, end_s, tenant)
        query = rows_query(start_s, end_s, tenant)
        for body in await self._ask_all(ROWS_PATH, query):
            if body is None:
                raise UnavailableError("A router did not report its usage in time. Try again.")
            file_id, found = decode_rows(body)
            files.setdefault(file_id, found)
        for body in await self._ask_all(COPIES_PATH, query):
            copies += _decode_copies(body) if body else []  # an earlier release has none
        lost = latest_copies(copy for copy in copies if copy[0] not in files)
        return merge_rows([*files.values(), lost])

    async def _ask_all(self, path: str, query: str) -> list[bytes | None]:
        links = list(self._routers.links().values()) if self._routers else []
        return await asyncio.gather(*(fetch(link, path, query, QUERY_TIMEOUT_S) for link in links))


def latest_copies(copies: Iterable[tuple[str, UsageRow]]) -> list[UsageRow]:
    """Return one row for each file and key: that with the most requests, which only grow."""
    latest: dict[tuple[str, UsageKey], UsageSums] = {}
    for file_id, (key, sums) in copies:
        known = latest.setdefault((file_id, key), sums)
        if sums.requests > known.requests:
            latest[file_id, key] = sums
    return [(key, sums) for (_, key), sums in latest.items()]


def _router_query(request: Request, path: str) -> tuple[float, float, str | None]:
    """Return start, end and tenant that another router asks for; see ``rows_query``."""
    require_operator(request, path)
    query = _query(request)
    start_s, end_s = (parse_time(query.get(name, ""), name) for name in ("start", "end"))
    return start_s, end_s, query.get("tenant")


def rows_query(start_s: float, end_s: float, tenant: str | None = None) -> str:
    """Return the query string for ``ROWS_PATH`` and ``COPIES_PATH``."""
    return urlencode(
        {"start": start_s, "end": end_s, **({} if tenant is None else {"tenant": tenant})}
    )


def _visible_tenant(caller: Identity, requested: str | None) -> str | None:
    """Return the tenant to show, or None for all tenants."""
    if caller.sees_all or requested == caller.tenant.name:
        return requested
    if requested is not None:
        raise PermissionDeniedError(
            "This key may read only its own tenant's usage.", param="tenant"
        )
    return caller.tenant.name


def _query(request: Request) -> dict[str, str]:
    query = query_of(request)
    for name in query:
        if name not in _PARAMETERS:
            raise InvalidRequestError(
                f"Unknown parameter: {name[:40]!r}; allowed: {', '.join(_PARAMETERS)}", param=name
            )
    return query
