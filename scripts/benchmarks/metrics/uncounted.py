"""A deployment that counts nothing, for the benchmark alone.

Not a setting: autoscaling by SLO, the dashboard and ``/v1/usage`` read what is counted. So this
puts parts that do nothing in the place of those that count, inside the replicas' own processes.
What limits requests (``cluster.gateway.admission.quotas``) stays, with its counts.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from cluster.config import TandemConfig
from cluster.gateway import gateway
from cluster.gateway.messages import Request
from cluster.gateway.pools import relay
from cluster.gateway.recording.observer import Ending, Observers, PoolMeter, RequestObserver
from cluster.gateway.recording.request_log import CLIENT_LEFT
from cluster.link import RequestHead
from cluster.metrics import Histogram, Registry
from cluster.usage import Usage
from deployments import app, replica, router
from deployments.generator import Generator
from deployments.router import Router

ARGS: Mapping[str, Any] = {
    "accounting": {"energy": False},
    "leaks": {"sample_s": 1e6, "window_s": 1e7},
}
"""What the configuration itself can turn off."""


class _Unkept(list[float]):
    def append(self, value: float) -> None:
        pass


class Unwatched(RequestObserver):
    """A request that nobody counts, logs or traces; its limits are told of its end."""

    __slots__ = ()

    def __init__(self, grant: Ending | None) -> None:
        self.status = CLIENT_LEFT
        self.cut_off = False
        self.writes = _UNKEPT
        self._grant = grant

    def placed(self, replica: str) -> None:
        """Nothing."""

    def asks(
        self, head: RequestHead, replica_id: str, address: tuple[str, int], way: str
    ) -> RequestHead:
        """The head as it is."""
        return head

    def end(self, usage: Usage | None) -> None:
        """Give back what the tenant's limits gave."""
        if self._grant is not None:
            self._grant.end(self.status, usage)


_UNKEPT = _Unkept()


class _Blind(Histogram):
    def observe(self, value: float) -> None:
        pass


class UncountingMeter(PoolMeter):
    """Watches no request."""

    def __init__(self, model: str, observers: Observers) -> None:
        super().__init__(model, observers)
        self.choice_s = _Blind(())

    def watch(self, request: Request, route: str, grant: Ending | None = None) -> RequestObserver:
        """The same for every request."""
        return Unwatched(grant)


class _NoExporter:
    def __init__(self, registry: Registry) -> None:
        pass

    async def close(self) -> None:
        pass


class UncountingRouter(Router):
    """A router without meters; its figures go nowhere."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        with (
            patch.object(gateway, "PoolMeter", UncountingMeter),
            patch.object(router, "RayExporter", _NoExporter),
        ):
            await super().__init__(config, pools)
        patch.object(relay, "perf_counter", float).start()  # nobody wants the times of writes


class UncountingGenerator(Generator):
    """A generator whose figures go nowhere."""

    async def _start(self, *args: Any) -> None:
        with patch.object(replica, "RayExporter", _NoExporter):
            await super()._start(*args)


def build(args: dict[str, Any]) -> Application:
    """The usual application of other deployments."""
    # Taken back: Serve may build another application in this process.
    with (
        patch.object(app, "Router", UncountingRouter),
        patch.object(app, "Generator", UncountingGenerator),
    ):
        return app.build(args)
