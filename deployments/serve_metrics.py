"""Serve's metrics of requests for replicas that links reach.

Serve counts the requests that it delivers itself: those over its handle. Ray's dashboard draws its
Serve and LLM panels from these counts, and joins vLLM's metrics with them, so replicas export the
requests over links under Serve's names.
"""

import time

from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.gateway.pools.routes import OTHER, RouteTable
from cluster.metrics import Metric, Registry

_BOUNDS_MS = (
    1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 1000, 2000, 5000, 10_000, 60_000, 120_000,
    300_000, 600_000,
)  # fmt: skip
# RayMetrics exports gauges, so the names have the suffixes that Prometheus adds to Serve's.
REQUESTS = Metric(
    "serve_deployment_request_counter_total", "counter", "Requests processed.", ("route",)
)
ERRORS = Metric(
    "serve_deployment_error_counter_total", "counter", "Requests with an exception.", ("route",)
)
LATENCY = Metric(
    "serve_deployment_processing_latency_ms",
    "histogram",
    "Duration of requests.",
    ("route",),
    tuple(map(float, _BOUNDS_MS)),
)


class CountedApp:
    """Application of a link server that counts its requests as Serve does.

    Args:
        app: The replica's application.
        routes: Routes of the engine, for the label ``route``.
        registry: Registry for the counts.
    """

    def __init__(self, app: ASGIApp, routes: RouteTable, registry: Registry) -> None:
        self._app = app
        self._routes = routes
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        route = self._routes.find(scope["path"]) or OTHER
        counter = REQUESTS
        try:
            await self._app(scope, receive, send)
        except Exception:
            counter = ERRORS
            raise
        finally:
            self._registry.counter(counter, route).add()
            latency_ms = (time.monotonic() - began) * 1000
            self._registry.histogram(LATENCY, route).observe(latency_ms)
