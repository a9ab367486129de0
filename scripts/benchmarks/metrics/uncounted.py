"""Deployment without metrics, only for the benchmark.

Metrics cannot be turned off by configuration, because SLO autoscaling, the dashboard and
``/v1/usage`` need them. This module replaces the metrics code by code that does nothing, inside the
processes of router and replicas. Quotas and their counters (``cluster.gateway.admission.quotas``)
stay.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.config import TandemConfig
from cluster.gateway.messages import Request
from cluster.gateway.pools import factory, relayed_body
from cluster.gateway.recording.observer import OnEnd, PoolMeter, RequestObserver, RequestSinks
from cluster.metrics import Histogram, Registry
from cluster.usage import Usage
from deployments import app, replica, router
from deployments.replica import Generator
from deployments.router import Router

ARGS: Mapping[str, Any] = {
    "accounting": {"energy": False},
    "leaks": {"sample_s": 1e6, "window_s": 1e7},
}
"""Configuration that turns off energy accounting and memory sampling."""


class _DiscardingList(list[float]):
    def append(self, value: float) -> None:
        pass


class UncountedRequest(RequestObserver):
    """Request without metrics, log and trace; only its quotas see its end."""

    __slots__ = ()

    @property
    def write_times(self) -> list[float]:
        """List that stays empty."""
        return _DISCARDED

    @write_times.setter
    def write_times(self, times: list[float]) -> None:
        pass

    def slot_taken(self, replica_id: str) -> None:
        self._slot_taken = 1.0  # saves reading the clock

    def count_gaps(self) -> None:
        pass

    def end(self, usage: Usage | None) -> None:
        """Report the end to the tenant's quotas."""
        if self._on_end is not None:
            self._on_end(self.status, usage, bool(self._slot_taken))


_DISCARDED = _DiscardingList()


class _DiscardingHistogram(Histogram):
    def observe(self, value: float, count: int = 1) -> None:
        pass


class UncountingMeter(PoolMeter):
    """Meter that counts no request."""

    def __init__(self, pool_name: str, sinks: RequestSinks, model: str | None = None) -> None:
        super().__init__(pool_name, sinks, model)
        self.routing_s = _DiscardingHistogram(())

    def observe(self, request: Request, route: str, on_end: OnEnd | None = None) -> RequestObserver:
        """Return an observer without metrics."""
        return UncountedRequest(self, request, route, on_end)


@contextmanager
def uncounted() -> Iterator[None]:
    """Let pools that are created have no meter; writes do not read the clock from then on."""
    patch.object(relayed_body, "perf_counter", float).start()
    with patch.object(factory, "PoolMeter", UncountingMeter):
        yield


class _NoExporter:
    def __init__(self, registry: Registry) -> None:
        pass

    async def close(self) -> None:
        pass


class UncountingRouter(Router):
    """Router without meters and without an exporter."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        with uncounted(), patch.object(router, "RayExporter", _NoExporter):
            await super().__init__(config, pools)


class UncountingGenerator(Generator):
    """Generator without an exporter."""

    async def _start(self, *args: Any) -> None:
        with patch.object(replica, "RayExporter", _NoExporter):
            await super()._start(*args)


def build(args: dict[str, Any]) -> Application:
    """Build the usual application with these deployments."""
    # Undo the patches: Serve may build another application in this process.
    with (
        patch.object(app, "Router", UncountingRouter),
        patch.object(app, "Generator", UncountingGenerator),
    ):
        return app.build(args)
