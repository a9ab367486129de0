"""The scenario's server without Ray: gateway, link and simulated engine on one event loop."""

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.overload.engine import generator, write_tenants
from benchmarks.overload.outcome import Ask
from benchmarks.overload.scenario import BODY, Scenario
from benchmarks.targets.running import MODEL
from cluster.asgi import Message
from cluster.config import parse
from cluster.engines.sim.engine import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.key_file import KeyFile
from cluster.link import LinkServer

_SECRET = b"s" * 32
_PATH = "/v1/completions"


@asynccontextmanager
async def running() -> AsyncIterator[Ask]:
    """How to ask it."""
    config = parse({"generators": [generator()]})
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-overload-")))
        keys = write_tenants(home / "keys.yaml")
        engine = SimEngine(config.generators[0])
        await engine.start()
        stack.push_async_callback(engine.stop)
        server = LinkServer(engine.app, _SECRET, load=engine.load)
        host, port = await server.start()
        stack.push_async_callback(server.stop)
        key_file = KeyFile(home / "keys.yaml", expected=True)
        gateway = Gateway(config, {MODEL: Wiring(_SECRET)}, key_file=key_file)
        stack.push_async_callback(gateway.close)
        gateway.pools[MODEL].update([ReplicaInfo("one", host, port, engine.routes())])
        app = GatewayApp(gateway, behind_serve=True)

        async def ask(tenant: str, tokens: int) -> int:
            return await _ask(app, keys[tenant], tokens)

        yield ask


async def _ask(app: GatewayApp, key: str, tokens: int) -> int:
    body = json.dumps({**BODY, "model": MODEL, "max_tokens": tokens}).encode()
    timeout = str(Scenario().deadline_s).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": _PATH,
        "query_string": b"",
        "headers": [
            (b"x-api-key", key.encode()),
            (b"content-type", b"application/json"),
            (b"x-request-timeout-seconds", timeout),
        ],
    }
    status = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    return status
