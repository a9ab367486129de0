"""Deployments that count no request with a certain header, only for the benchmark.

Metrics cannot be turned off by configuration, because SLO autoscaling, the dashboard and
``/v1/usage`` need them. Requests with and without metrics share every process here: two processes
that run the same code differ by more CPU time than metrics cost. Stays for both: quotas and their
counters (``cluster.gateway.admission.quotas``), the time of a routing decision, and one reading of
the clock for each read from a link.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.asgi import Receive, Scope, Send
from cluster.config import TandemConfig
from cluster.gateway.messages import Request
from cluster.gateway.pools import factory
from cluster.gateway.recording.observer import OnEnd, PoolMeter, RequestObserver
from cluster.usage import Usage
from deployments import app, replica
from deployments.replica import Generator
from deployments.router import Router
from deployments.serve_metrics import CountedApp

HEADER = ("user-agent", "uncounted")
"""Header of requests that are not counted; routers pass it on to replicas."""
_HEADER = HEADER[0].encode(), HEADER[1].encode()


class UncountedRequest(RequestObserver):
    """Request without metrics, log and trace; only its quotas see its end."""

    __slots__ = ()

    def new_write_times(self) -> list[float] | None:
        """Return None: no time is noted."""
        return None

    def slot_taken(self, replica_id: str) -> None:
        self._slot_taken = 1.0  # saves reading the clock

    def count_gaps(self) -> None:
        pass

    def end(self, usage: Usage | None) -> None:
        """Report the end to the tenant's quotas."""
        if self._on_end is not None:
            self._on_end(self.status, usage, bool(self._slot_taken))


class SwitchedMeter(PoolMeter):
    """Meter of the requests without the header."""

    def observe(self, request: Request, route: str, on_end: OnEnd | None = None) -> RequestObserver:
        """Return an observer, without metrics if the request has the header."""
        if _HEADER in request.headers:
            return UncountedRequest(self, request, route, on_end)
        return super().observe(request, route, on_end)


class SwitchedApp(CountedApp):
    """Application that counts the requests without the header."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if _HEADER in scope["headers"]:
            await self._app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


@contextmanager
def switched() -> Iterator[None]:
    """Let pools that are created count only requests without the header."""
    with patch.object(factory, "PoolMeter", SwitchedMeter):
        yield


class SwitchedRouter(Router):
    """Router that counts only requests without the header."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        with switched():
            await super().__init__(config, pools)


class SwitchedGenerator(Generator):
    """Generator that counts only requests without the header."""

    async def _start(self, *args: Any) -> None:
        with patch.object(replica, "CountedApp", SwitchedApp):
            await super()._start(*args)


def build(args: dict[str, Any]) -> Application:
    """Build the usual application with these deployments."""
    # Undo the patches: Serve may build another application in this process.
    with (
        patch.object(app, "Router", SwitchedRouter),
        patch.object(app, "Generator", SwitchedGenerator),
    ):
        return app.build(args)
