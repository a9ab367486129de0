"""Servers for the scenario: the full cluster, or gateway, link and engine in this process."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.overload.scenario import (
    BODY,
    SEQUENCES,
    STEP_S,
    VICTIM,
    WEIGHTS,
    Response,
    ResponseReader,
    Scenario,
    SendRequest,
)
from benchmarks.targets.running import SIM_MODEL
from benchmarks.targets.tandem import tandem_with_pools
from cluster.admission.keys import KeyEntry, KeyFileContents, TenantEntry, digest, new_key
from cluster.asgi import Message
from cluster.config import parse
from cluster.engines.sim.engine import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.key_file import KeyFile, write_keys
from cluster.link import LinkServer

PATH = "/v1/completions"
RESPONSE_TIMEOUT_S = 60.0
_STATUS_BYTES = 12  # HTTP/1.1 200
_SECRET = b"s" * 32


@asynccontextmanager
async def full_cluster() -> AsyncIterator[SendRequest]:
    """Start a cluster as ``tandem up`` does; each request has its own connection."""
    with _cluster_endpoints() as endpoints:

        async def send(tenant: str, tokens: int) -> Response:
            return await _send_http(endpoints[tenant], tokens, streamed=tenant == VICTIM)

        yield send


@asynccontextmanager
async def in_process() -> AsyncIterator[SendRequest]:
    """Start gateway, link and simulated engine on the running event loop, without Ray."""
    config = parse({"generators": [_generator()]})
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-overload-")))
        keys = _write_tenants(home / "keys.yaml")
        engine = SimEngine(config.generators[0])
        await engine.start()
        stack.push_async_callback(engine.stop)
        server = LinkServer(engine.app, _SECRET, load=engine.load)
        host, port = await server.start()
        stack.push_async_callback(server.stop)
        key_file = KeyFile(home / "keys.yaml", expected=True)
        gateway = Gateway(config, {SIM_MODEL: Wiring(_SECRET)}, key_file=key_file)
        stack.push_async_callback(gateway.close)
        gateway.pools[SIM_MODEL].update([ReplicaInfo("one", host, port, engine.routes())])
        app = GatewayApp(gateway, behind_serve=True)

        async def send(tenant: str, tokens: int) -> Response:
            return await _send_asgi(app, keys[tenant], tokens, streamed=tenant == VICTIM)

        yield send


def _generator() -> dict[str, Any]:
    sim = {"decode_s_per_token": STEP_S, "max_num_seqs": SEQUENCES}
    return {"name": SIM_MODEL, "model": SIM_MODEL, "engine": "sim", "sim": sim}


def _write_tenants(path: Path) -> dict[str, str]:
    """Write a key file with one key per tenant; return the keys."""
    keys = {tenant: new_key() for tenant in WEIGHTS}
    entries = {tenant: TenantEntry(weight=weight) for tenant, weight in WEIGHTS.items()}
    hashes = tuple(KeyEntry(sha256=digest(key), tenant=name) for name, key in keys.items())
    write_keys(path, KeyFileContents(tenants=entries, keys=hashes))
    return keys


@contextmanager
def _cluster_endpoints() -> Iterator[dict[str, Endpoint]]:
    """Yield an endpoint with an API key for each tenant."""
    with tempfile.TemporaryDirectory(prefix="bench-overload-") as folder:
        path = Path(folder) / "keys.yaml"
        keys = _write_tenants(path)
        pools = {"generators": [_generator()]}
        with tandem_with_pools(pools, SIM_MODEL, {"keys_file": str(path)}) as running:
            at = running.endpoint
            yield {
                tenant: Endpoint(at.port, at.model, _headers(key), at.host)
                for tenant, key in keys.items()
            }


def _headers(key: str) -> dict[str, str]:
    return {
        "x-api-key": key,
        "x-request-timeout-seconds": str(Scenario().deadline_s),
        "connection": "close",
    }


async def _send_http(endpoint: Endpoint, tokens: int, *, streamed: bool) -> Response:
    """Return the response; its status is 0 if it is incomplete."""
    body = {**BODY, "model": endpoint.model, "max_tokens": tokens, "stream": streamed}
    request = endpoint.encode_request(PATH, body)
    received, head = ResponseReader(streamed=streamed), b""
    try:
        async with asyncio.timeout(RESPONSE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            try:
                writer.write(request)
                while data := await reader.read(65536):
                    head = (head + data)[:_STATUS_BYTES]
                    received.feed(data)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return Response(0)
    is_status = head.startswith(b"HTTP/1.1 ") and head[9:12].isdigit()
    return received.response(int(head[9:12]) if is_status else 0)


async def _send_asgi(app: GatewayApp, key: str, tokens: int, *, streamed: bool) -> Response:
    fields = {**BODY, "model": SIM_MODEL, "max_tokens": tokens, "stream": streamed}
    body = json.dumps(fields).encode()
    timeout = str(Scenario().deadline_s).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "query_string": b"",
        "headers": [
            (b"x-api-key", key.encode()),
            (b"content-type", b"application/json"),
            (b"x-request-timeout-seconds", timeout),
        ],
    }
    status, received = 0, ResponseReader(streamed=streamed)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        received.feed(message.get("body", b""))

    await app(scope, receive, send)
    return received.response(status)
