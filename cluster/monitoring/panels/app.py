"""HTTP application: what Ray's dashboard asks of Grafana, and the data of its pages."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cluster
from cluster.monitoring.panels import content
from cluster.monitoring.panels.dashboards import Dashboard, Library
from cluster.monitoring.panels.prometheus import BusyError, Prometheus, QueryError
from cluster.monitoring.panels.queries import (
    BadRequestError,
    Selection,
    TimeRange,
    parse_range,
    select,
)

STATIC = Path(__file__).parent / "static"
# The package of the pages imports the whole gateway, so take the files by their path.
VENDORED = Path(cluster.__file__).parent / "gateway" / "builtin" / "pages" / "vendor"
ASSETS = {
    "panels.css": STATIC / "panels.css",
    "panels.js": STATIC / "panels.js",
    "uPlot.iife.min.js": VENDORED / "uPlot.iife.min.js",
    "uPlot.min.css": VENDORED / "uPlot.min.css",
}
LOOPBACK_NAMES = ["127.0.0.1", "localhost"]
_DEFAULT_POINTS = 200
_PAGES = ("/", "/d/{uid}", "/d/{uid}/{slug:path}", "/d-solo/{uid}", "/d-solo/{uid}/{slug:path}")


class PanelServer:
    """Handlers of the requests."""

    def __init__(self, library: Library, prometheus: Prometheus) -> None:
        self._library = library
        self._prometheus = prometheus

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/api/health", self.health),
            *(Route(path, self.page) for path in _PAGES),
            Route("/assets/{name}", self.asset),
            Route("/data/dashboards", self.dashboards),
            Route("/data/dashboards/{uid}", self.dashboard),
            Route("/data/panels/{uid}/{id:int}", self.panel),
        ]

    async def health(self, _request: Request) -> Response:
        """Answer as Grafana does; Ray's dashboard reads ``database``."""
        return JSONResponse({"database": "ok", "server": "Tandem's stand-in for Grafana"})

    async def page(self, _request: Request) -> Response:
        return FileResponse(STATIC / "panels.html")

    async def asset(self, request: Request) -> Response:
        path = ASSETS.get(request.path_params["name"])
        return Response(status_code=404) if path is None else FileResponse(path)

    async def dashboards(self, _request: Request) -> Response:
        return JSONResponse(content.list_dashboards(self._library.dashboards()))

    async def dashboard(self, request: Request) -> Response:
        board = self._find(request)
        selection, times = _parameters(request, board)
        return JSONResponse(
            await content.dashboard_content(self._prometheus, board, selection, times)
        )

    async def panel(self, request: Request) -> Response:
        board = self._find(request)
        panel = board.by_id.get(request.path_params["id"])
        if panel is None or panel.kind == "row":
            raise LookupError(f"{board.title} has no panel {request.path_params['id']}")
        selection, times = _parameters(request, board)
        return JSONResponse(
            await content.panel_content(self._prometheus, board, panel, selection, times)
        )

    def _find(self, request: Request) -> Dashboard:
        uid = request.path_params["uid"]
        if (board := self._library.dashboards().get(uid)) is None:
            raise LookupError(f"there is no dashboard {uid[:60]!r}")
        return board


def _parameters(request: Request, board: Dashboard) -> tuple[Selection, TimeRange]:
    query = request.query_params
    names = {name for name in query if name.startswith("var-")}
    values = {name.removeprefix("var-"): query.getlist(name) for name in names}
    points = query.get("points", "")
    times = parse_range(
        query.get("from") or "now-1h",
        query.get("to") or "now",
        int(points) if points.isdecimal() and len(points) < 6 else _DEFAULT_POINTS,
        time.time(),
    )
    return select(board, values), times


def make_app(
    library: Library, http: httpx.AsyncClient, frame_ancestors: Sequence[str]
) -> Starlette:
    """Return the application.

    Args:
        library: Dashboards to show.
        http: Client of Prometheus; closed at shutdown.
        frame_ancestors: Origins of pages that may embed panels.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with http:
            yield

    return Starlette(
        routes=PanelServer(library, Prometheus(http)).routes,
        lifespan=lifespan,
        exception_handlers={
            BadRequestError: _error(400),
            LookupError: _error(404),
            BusyError: _error(503),
            QueryError: _error(502),
        },
        middleware=[
            # Otherwise pages elsewhere could read answers after a change of their name's address.
            Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES, www_redirect=False),
            Middleware(SecurityHeaders, frame_ancestors=frame_ancestors),
        ],
    )


def _error(status: int) -> Any:
    def handle(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error.args[0])}, status)

    return handle


class SecurityHeaders:
    """Middleware that adds headers to each response."""

    def __init__(self, app: ASGIApp, frame_ancestors: Sequence[str]) -> None:
        self._app = app
        ancestors = " ".join(frame_ancestors) or "'none'"
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors {ancestors}"
        )
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)
