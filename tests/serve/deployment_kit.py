"""Replicas of the Serve deployments in this process, without Ray: real links, simulated engine."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from cluster.config import TandemConfig, parse
from cluster.link import ClientStream, LinkClient, RequestHead
from cluster.serve_internals import DeploymentID
from deployments import links, replica, router, watching
from deployments.replica import Generator
from deployments.router import Router

SECRET = b"s" * 32
POOL = "g"
COMPLETION = RequestHead(
    method="POST", path="/v1/completions", headers=[(b"content-type", b"application/json")]
)
TOKEN_S = 0.01
"""Time per token of the simulated engine, in seconds."""


class RunningGenerator(Generator):
    """Generator replica that is stopped by the test instead of the garbage collector."""

    stop = Generator.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


class RunningRouter(Router):  # type: ignore[misc]  # the decorator is not typed
    """Router replica that is stopped by the test instead of the garbage collector."""

    stop = Router.__del__

    def __del__(self) -> None:
        pass


class Background:
    """Stands in for what needs Ray: the export of metrics, discovery, the proxies' setup."""

    def __init__(self, *args: Any) -> None:
        pass

    async def set_up_all(self) -> None:
        pass

    async def reconfigure(self, *args: Any) -> None:
        pass

    async def close(self) -> None:
        pass


def make_config(
    sim: dict[str, Any] | None = None, stall_timeout_s: float = 60, **fields: Any
) -> TandemConfig:
    generator = {
        "stall_timeout_s": stall_timeout_s,
        "name": POOL,
        "model": "m",
        "engine": "sim",
        "sim": {"decode_s_per_token": TOKEN_S, **(sim or {})},
    }
    return parse({"generators": [generator], **fields})


def replace_ray(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let deployments run without Ray; ``directory`` gets their files."""
    identity = SimpleNamespace(unique_id="r1", deployment_id=DeploymentID("d", "app"))
    context = SimpleNamespace(replica_id=identity)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(watching, "_devices", lambda config, model, workers: None)
    monkeypatch.setattr(links, "link_secret", lambda: SECRET)
    monkeypatch.setattr(router, "link_secret", lambda: SECRET)
    monkeypatch.setattr(router, "home", lambda: directory)
    monkeypatch.setattr(router, "kv_get_many", lambda keys, timeout_s: [])
    monkeypatch.setattr(router, "get_serve_logs_dir", lambda: str(directory))
    monkeypatch.setattr(router, "wrap_http_app", lambda *args: None)
    monkeypatch.setattr(router, "end_http10_bodies_by_closing", lambda: None)
    monkeypatch.setattr(router, "offer_direct_writes", lambda: None)
    for module in (replica, router):
        monkeypatch.setattr(module, "log_with_serve", lambda: None)
        monkeypatch.setattr(module, "RayExporter", Background)
    monkeypatch.setattr(replica, "relay_to_serve", lambda name, warnings_only: None)
    monkeypatch.setattr(router, "Discovery", Background)
    monkeypatch.setattr(router, "RayNodes", Background)
    monkeypatch.setattr(router, "ProxySetup", Background)

    async def get_http_host(timeout_s: float) -> str:
        return "127.0.0.1"

    monkeypatch.setattr(router, "get_http_host", get_http_host)


@asynccontextmanager
async def running_generator(config: TandemConfig) -> AsyncIterator[tuple[Any, LinkClient]]:
    """Start the generator's replica; yield it and a link to it."""
    started: Any = RunningGenerator.__new__(RunningGenerator)
    await started.__init__(config.generators[0], config.operations)
    async with _linked(started) as link:
        yield started, link


@asynccontextmanager
async def running_router(config: TandemConfig) -> AsyncIterator[tuple[Any, LinkClient]]:
    """Start a router whose pool has no replica; yield it and a link to it."""
    started: Any = RunningRouter.__new__(RunningRouter)
    handle = SimpleNamespace(deployment_name=POOL, app_name="app")
    await started.__init__(config, {POOL: handle})
    async with _linked(started) as link:
        yield started, link


@asynccontextmanager
async def _linked(started: Any) -> AsyncIterator[LinkClient]:
    metadata = started.record_replica_metadata()
    link = LinkClient(metadata["host"], metadata["port"], SECRET)
    try:
        await link.connect()
        yield link
    finally:
        await link.close()
        await started.stop()


def open_completion(link: LinkClient, tokens: int) -> ClientStream:
    """Request a stream of ``tokens`` tokens."""
    return link.open(COMPLETION, completion_body(tokens))


def completion_body(tokens: int) -> bytes:
    fields = {"model": POOL, "prompt": "a", "max_tokens": tokens, "stream": True}
    return json.dumps(fields).encode()
