"""The link server of a replica: its address, the cluster's secret and TLS."""

import os
import secrets
from collections.abc import Callable

import ray

from cluster.asgi import ASGIApp
from cluster.link import AnswerStore, LinkServer, PrefixSource, certificate_expiry, tls_contexts
from cluster.load import Load
from cluster.metrics import Registry, table
from cluster.ray_internals import kv_get, kv_put_if_absent

_SECRET_KEY = b"link-secret"
_SECRET_BYTES = 32


def link_secret() -> bytes:
    """Return the cluster's link secret, 32 bytes from its GCS; the first caller creates it.

    A process that can read the GCS can control the cluster anyway; ``RAY_AUTH_MODE=token`` closes
    the GCS to others.
    """
    # Of several writers the first one wins, and all of them read its value.
    kv_put_if_absent(_SECRET_KEY, secrets.token_bytes(_SECRET_BYTES))
    secret = kv_get(_SECRET_KEY)
    if not isinstance(secret, bytes) or len(secret) != _SECRET_BYTES:
        raise RuntimeError("the cluster's link secret could not be read from the GCS")
    return secret


async def start_link_server(
    app: ASGIApp,
    load: Callable[[], Load] | None = None,
    prefixes: PrefixSource | None = None,
    *,
    resumes: bool = False,
    answers: AnswerStore | None = None,
) -> LinkServer:
    """Start a link server on this node's address; see ``LinkServer`` for the arguments."""
    tls = tls_contexts(os.environ)
    server = LinkServer(
        app,
        link_secret(),
        host=ray.util.get_node_ip_address(),
        ssl=tls.server if tls else None,
        load=load,
        prefixes=prefixes,
        resumes=resumes,
        answers=answers,
    )
    await server.start()
    return server


def record_certificate_expiry(registry: Registry) -> None:
    """Set the gauge of this process' certificate expiry if TLS is on."""
    if tls := tls_contexts(os.environ):
        registry.gauge(table.CERTIFICATE_EXPIRY).value = certificate_expiry(tls)
