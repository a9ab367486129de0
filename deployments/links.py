"""The link server of a process of the cluster: its node's address, the cluster's secret and TLS."""

import os
from collections.abc import Callable

import ray

from cluster.asgi import ASGIApp
from cluster.link import LinkServer, PrefixSource, certificate_expiry, tls_contexts
from cluster.load import Load
from cluster.metrics import Registry, table
from deployments.secret import link_secret


async def serve_links(
    app: ASGIApp,
    load: Callable[[], Load] | None = None,
    prefixes: PrefixSource | None = None,
) -> LinkServer:
    """A server that has started; see ``LinkServer``."""
    tls = tls_contexts(os.environ)
    server = LinkServer(
        app,
        link_secret(),
        host=ray.util.get_node_ip_address(),
        ssl=tls.server if tls else None,
        load=load,
        prefixes=prefixes,
    )
    await server.start()
    return server


def watch_certificate(registry: Registry) -> None:
    """Have ``registry`` say until when this process' certificate is valid, where it has one."""
    if tls := tls_contexts(os.environ):
        registry.gauge(table.CERTIFICATE_EXPIRY).value = certificate_expiry(tls)
