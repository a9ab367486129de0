"""The router deployment: a gateway that follows Serve's view of the running replicas."""

import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.accounting.usage_log import UsageLog
from cluster.asgi import ASGIApp
from cluster.batches import open_store
from cluster.client.transport import LinkOffer
from cluster.config import RouterConfig, TandemConfig
from cluster.config.file import ALL_ADDRESSES, is_loopback, key_file_path
from cluster.gateway import (
    BatchService,
    Gateway,
    GatewayApp,
    QuotaSync,
    ReplicaInfo,
    RouterLinks,
    UsageAccount,
    UsageCopies,
    Wiring,
)
from cluster.gateway.serve_http import (
    ServeAdapter,
    end_http10_bodies_by_closing,
    offer_direct_writes,
)
from cluster.haproxy_internals import router_socket_opener
from cluster.key_file import ClusterKeys, KeyFile, KeySource
from cluster.leaks import MemoryWatch
from cluster.link import RequestHead, ResponseHead, TlsContexts, answer_locally, tls_contexts
from cluster.memory import release_free_memory
from cluster.models.store import home
from cluster.periodic import run_in_daemon_thread
from cluster.ray_internals import KEYS_KEY, kv_get_many, signal_rest
from cluster.serve_internals import (
    DeploymentID,
    confine_replica_to_loopback,
    get_http_host,
    get_serve_logs_dir,
    wrap_http_app,
)
from cluster.tracing import start_tracer
from cluster.usage import Usage
from deployments.decisions import read_decisions
from deployments.discovery import Discovery, handle_opener
from deployments.links import link_secret, record_certificate_expiry, start_link_server
from deployments.logs import close_request_log, log_with_serve, open_request_log
from deployments.metrics import RayExporter
from deployments.nodes import RayNodes
from deployments.operations import HeadControl
from deployments.proxies import ProxySetup
from deployments.rollout_sync import RolloutAccess, RolloutSync

logger = logging.getLogger("ray.serve.tandem")

HTTP_HOST_TIMEOUT_S = 60.0
"""Maximum time for Serve's controller to answer a starting router; longer than its restart."""
KEYS_TIMEOUT_S = 2.0
"""Maximum time for a read of the cluster's keys, in seconds."""
USAGE_FILE = "usage-{app}.sqlite3"
"""Name of the usage file in the cluster's home; all routers of a machine share it."""
BATCHES_DIRECTORY = "batches-{app}"
"""Directory of files and batches in the cluster's home."""


@serve.ingress()
class Router:
    """Replica of the router; HTTP requests come through ``__serve_build_asgi_app__``."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: TandemConfig,
        pools: Mapping[str, DeploymentHandle],
        _rollouts: DeploymentHandle | None = None,  # Serve deploys what the router refers to
    ) -> None:
        self._max_answer_s = config.max_answer_s
        confine_replica_to_loopback()
        end_http10_bodies_by_closing()
        offer_direct_writes()
        http_host = await get_http_host(HTTP_HOST_TIMEOUT_S)
        host = ingress_host(ray.util.get_node_ip_address(), http_host)
        wrap_http_app(_adapt, host, router_socket_opener())
        log_with_serve()
        self._secret, tls = link_secret(), tls_contexts(os.environ)
        identity = serve.get_replica_context().replica_id
        self._links = RouterLinks(identity.unique_id, self._secret, tls.client if tls else None)
        self._log = open_request_log(Path(get_serve_logs_dir()), identity.unique_id)
        self._tracer = start_tracer(config.tracing, "tandem.router", identity.unique_id)
        router_deployment = identity.deployment_id
        pool_deployments = {
            name: DeploymentID(handle.deployment_name, handle.app_name)
            for name, handle in pools.items()
        }
        self._config = config
        self._is_exposed = not is_loopback(http_host)
        self._key_file = key_source(config.router)
        self._nodes = RayNodes(self._on_draining_nodes)
        usage = _start_usage(config, router_deployment.app_name)
        self._usage_copies = UsageCopies(usage, self._links)
        self._gateway = Gateway(
            config,
            _wirings(pools, self._secret, tls),
            versions=_versions(),
            key_file=self._key_file,
            tracer=self._tracer,
            usage=usage,
            routers=self._links,
            nodes=self._nodes,
            control=HeadControl(lambda: self._config.router),
            batches=_batches(config, router_deployment.app_name, identity.unique_id),
            rollout_control=RolloutAccess(
                router_deployment.app_name,
                [pool.name for pool in config.pools],
            ),
            read_decisions=partial(read_decisions, [router_deployment, *pool_deployments.values()]),
            needs_keys=self._needs_keys(config),
            response_key=hmac.digest(self._secret, b"response ids", "sha256"),
        )
        self._gateway.start_batches()
        self._routers: list[ReplicaInfo] = []
        self._quota_sync = QuotaSync(self._gateway.admission, self._gateway.pools, self._links)
        listeners = {
            deployment: self._gateway.pools[name].update
            for name, deployment in pool_deployments.items()
        }
        self._discovery = Discovery({**listeners, router_deployment: self._on_routers})
        self._rollouts = RolloutSync(
            router_deployment.app_name, identity.unique_id, self._gateway.rollouts
        )
        await self._rollouts.start()
        self._proxies = ProxySetup(config.router)
        await self._proxies.set_up_all()
        registry = self._gateway.registry
        self._memory = MemoryWatch(config.leaks, "router", lambda: self._gateway.num_open_requests)
        registry.on_collect(lambda: self._memory.observe(registry))
        record_certificate_expiry(registry)
        self._exporter = RayExporter(registry)
        # Links and handles come from inside the cluster and need no API key.
        self._internal_app = self._quota_sync.wrap(GatewayApp(self._gateway, authenticates=False))
        self._server = await start_link_server(self._internal_app)
        signal_rest()()
        release_free_memory()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply a changed configuration, which ``build`` has validated; Serve calls this.

        Other names of pools and another tracing come with a new replica
        (``cluster.config.changes``).
        """
        config = TandemConfig.model_validate(user_config)
        before, self._config = self._config, config
        if config == before:  # right after the start
            return
        now, then = config.router, before.router
        if (now.keys_file, now.keys_in_cluster) != (then.keys_file, then.keys_in_cluster):
            self._key_file = key_source(config.router, self._key_file)
            await run_in_daemon_thread(self._key_file.refresh, "tandem-keys")
        self._gateway.reconfigure(config, self._key_file, needs_keys=self._needs_keys(config))
        self._max_answer_s = config.max_answer_s
        self._memory.reconfigure(config.leaks)
        await self._proxies.reconfigure(config.router)
        logger.info("applied a changed configuration")

    def _needs_keys(self, config: TandemConfig) -> bool:
        # `serve deploy` and KubeRay deploy without the checks of `tandem`.
        return (self._is_exposed or config.router.keys_in_cluster) and not config.router.open

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return this router's link address, which Serve passes to the other routers."""
        host, port = self._server.address
        return ReplicaInfo(id="", host=host, port=port).to_metadata()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the traffic by which pools and routers are scaled."""
        return self._gateway.load_report(time.monotonic(), time.process_time())

    def link_offer(self) -> LinkOffer:
        """Return what a client needs to open links to all routers."""
        others = [(router.host, router.port) for router in self._routers]
        return LinkOffer(self._secret, list({self._server.address, *others}))

    def _on_routers(self, running: Iterable[ReplicaInfo]) -> None:
        self._routers = list(running)
        self._quota_sync.update_routers(self._routers)

    def _on_draining_nodes(self, node_ids: frozenset[str]) -> None:
        for pool in self._gateway.pools.values():
            pool.replicas.set_draining_nodes(node_ids)

    def __serve_build_asgi_app__(self) -> GatewayApp:
        """Return the ASGI application that Serve runs in this replica."""
        return GatewayApp(self._gateway, behind_serve=True)

    async def call(
        self, head: RequestHead, body: bytes
    ) -> AsyncIterator[ResponseHead | bytes | Usage]:
        """Answer a request of another Ray job that cannot open a link."""
        async with aclosing(answer_locally(self._internal_app, head, body)) as items:
            async for item in items:
                yield item

    def check_health(self) -> None:
        """Raise if updates of the replicas no longer arrive; Serve then replaces this router."""
        self._discovery.check_health()

    async def __del__(self) -> None:
        """Drain and close the links; Serve awaits this after the last HTTP request has ended."""
        if hasattr(self, "_server"):
            await self._gateway.close_batches()  # another router goes on with them
            await self._server.drain(self._max_answer_s)
            await self._proxies.close()
            await self._discovery.close()
            await self._nodes.close()
            await self._quota_sync.close()
            await self._rollouts.close()
            await self._usage_copies.close()
            await self._gateway.close()
            await self._links.close()
            await self._memory.close()
            await self._exporter.close()
            if self._tracer is not None:
                await self._tracer.close()
            close_request_log(self._log)


def _adapt(app: ASGIApp, has_middlewares: bool) -> ServeAdapter:
    return ServeAdapter(app, writes_directly=not has_middlewares)


def ingress_host(node_address: str, http_host: str | None) -> str | None:
    """Return the address on which a router's HTTP server listens; None for Serve's choice.

    HAProxy connects to it at 127.0.0.1 on its own node, and at the node's address from others.
    """
    if is_loopback(node_address):
        return node_address
    if is_loopback(http_host):  # on such a cluster, one node serves HTTP
        return None
    return "::" if ":" in node_address else ALL_ADDRESSES


def key_source(config: RouterConfig, before: KeySource | None = None) -> KeySource:
    """Return the keys in the configured file, or else those in the cluster if it has any.

    Args:
        config: Section of the router.
        before: Source until now. If it is the cluster, it goes on with the keys it has read.
    """
    if config.keys_file is not None:
        return KeyFile(key_file_path(config), expected=True)
    local = None if config.keys_in_cluster else KeyFile(key_file_path(config), expected=False)
    if isinstance(before, ClusterKeys):
        before.local = local
        return before
    return ClusterKeys(_read_keys, local)


def _read_keys() -> bytes | None:
    return next(iter(kv_get_many([KEYS_KEY], KEYS_TIMEOUT_S)), None)


def _start_usage(config: TandemConfig, application: str) -> UsageAccount:
    file = home() / USAGE_FILE.format(app=application)
    usage = UsageAccount(config, UsageLog(file, config.accounting.keep_days))
    usage.start()
    return usage


def _batches(config: TandemConfig, application: str, router_id: str) -> BatchService | None:
    settings = config.router.batches
    if not settings.enabled:
        return None
    default = home() / BATCHES_DIRECTORY.format(app=application)
    directory = Path(settings.directory).expanduser() if settings.directory else default
    store = open_store(directory, settings.database, application)
    return BatchService(store, config.router, router_id)


def _wirings(
    pools: Mapping[str, DeploymentHandle], secret: bytes, tls: TlsContexts | None
) -> dict[str, Wiring]:
    ssl = tls.client if tls else None
    return {
        name: Wiring(secret, ssl, fallback=partial(handle_opener, handle))
        for name, handle in pools.items()
    }


def _versions() -> dict[str, str]:
    return {"tandem": version("tandem"), "ray": version("ray")}
