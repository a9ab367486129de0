"""The router deployment: the gateway, fed by Serve's view of the replicas."""

import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.handle import DeploymentHandle

from cluster.accounting.usage_log import UsageLog
from cluster.config import TandemConfig
from cluster.config.file import key_file_path
from cluster.gateway import (
    Gateway,
    GatewayApp,
    QuotaSync,
    ReplicaInfo,
    RouterLinks,
    UsageAccount,
    Wiring,
)
from cluster.key_file import KeyFile
from cluster.launch.loopback import confine_serve
from cluster.leaks import MemoryWatch
from cluster.link import RequestHead, ResponseHead, TlsContexts, answer_locally, tls_contexts
from cluster.models.store import home
from cluster.tracing import start_tracer
from cluster.usage import Usage
from deployments.decisions import read_decisions
from deployments.discovery import Discovery
from deployments.handles import opener
from deployments.links import serve_links, watch_certificate
from deployments.metrics import RayExporter
from deployments.replica import DRAIN_TIMEOUT_S
from deployments.request_log import close_request_log, open_request_log
from deployments.secret import link_secret
from deployments.serve_log import log_with_serve

USAGE_FILE = "usage-{app}.sqlite3"
"""Below the cluster's home; the routers of one machine share it."""


class LinkOffer(NamedTuple):
    """How another Ray job reaches the routers without Serve's handle."""

    secret: bytes
    addresses: list[tuple[str, int]]
    """Of every router that runs."""


@serve.ingress()
class Router:
    """One replica of the router; HTTP comes through ``__serve_build_asgi_app__``."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        confine_serve()
        log_with_serve()
        secret, tls = link_secret(), tls_contexts(os.environ)
        self._secret = secret
        router = config.router
        identity = serve.get_replica_context().replica_id
        own = identity.deployment_id
        self._links = RouterLinks(identity.unique_id, secret, tls.client if tls else None)
        self._log = open_request_log(Path(get_serve_logs_dir()), identity.unique_id)
        self._tracer = start_tracer(config.tracing, "tandem.router", identity.unique_id)
        file = home() / USAGE_FILE.format(app=own.app_name)
        usage = UsageAccount(config, UsageLog(file, config.accounting.keep_days))
        usage.start()
        keys = KeyFile(key_file_path(router), expected=router.keys_file is not None)
        wirings = _wirings(pools, secret, tls)
        scaled = {
            name: DeploymentID(handle.deployment_name, handle.app_name)
            for name, handle in pools.items()
        }
        self._gateway = Gateway(
            config,
            wirings,
            _versions(),
            keys,
            self._tracer,
            usage,
            self._links,
            partial(read_decisions, [own, *scaled.values()]),
        )
        self._routers: list[ReplicaInfo] = []
        self._peers = QuotaSync(self._gateway, self._links)
        listeners = {
            deployment: self._gateway.pools[name].update for name, deployment in scaled.items()
        }
        self._discovery = Discovery({**listeners, own: self._on_routers})
        registry = self._gateway.registry
        self._memory = MemoryWatch(config.leaks, "router", lambda: self._gateway.num_open_requests)
        registry.on_collect(lambda: self._memory.observe(registry))
        watch_certificate(registry)
        self._exporter = RayExporter(registry)
        # Inside the cluster, so no API key is asked for.
        self._inside = self._peers.app(GatewayApp(self._gateway, authenticates=False))
        self._server = await serve_links(self._inside)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where other Ray jobs reach this router."""
        host, port = self._server.address
        return ReplicaInfo(id="", host=host, port=port).metadata()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The traffic by which pools and routers are scaled."""
        return self._gateway.load_report(time.monotonic(), time.process_time())

    def link_offer(self) -> LinkOffer:
        """What a client needs to open links to all routers."""
        others = [(router.host, router.port) for router in self._routers]
        return LinkOffer(self._secret, list({self._server.address, *others}))

    def _on_routers(self, running: Iterable[ReplicaInfo]) -> None:
        self._routers = list(running)
        self._peers.update(self._routers)

    def __serve_build_asgi_app__(self) -> GatewayApp:
        """The ASGI application that Serve runs in this replica."""
        return GatewayApp(self._gateway, behind_serve=True)

    async def call(
        self, head: RequestHead, body: bytes
    ) -> AsyncIterator[ResponseHead | bytes | Usage]:
        """A request of another Ray job that cannot open a link."""
        async with aclosing(answer_locally(self._inside, head, body)) as items:
            async for item in items:
                yield item

    def check_health(self) -> None:
        """Raise when this router would not learn of replicas any more; Serve then replaces it."""
        self._discovery.check_health()

    async def __del__(self) -> None:
        """Drain and close the links; Serve awaits this after the last request ended."""
        if hasattr(self, "_server"):
            await self._server.drain(DRAIN_TIMEOUT_S)
            await self._discovery.close()
            await self._peers.close()
            await self._gateway.close()
            await self._links.close()
            await self._memory.close()
            await self._exporter.close()
            if self._tracer is not None:
                await self._tracer.close()
            close_request_log(self._log)


def _wirings(
    pools: Mapping[str, DeploymentHandle], secret: bytes, tls: TlsContexts | None
) -> dict[str, Wiring]:
    ssl = tls.client if tls else None
    return {
        name: Wiring(secret, ssl, fallback=partial(opener, handle))
        for name, handle in pools.items()
    }


def _versions() -> dict[str, str]:
    return {"tandem": version("tandem"), "ray": version("ray")}
