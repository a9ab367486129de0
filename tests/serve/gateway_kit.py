"""Gateway with real links and small applications as replicas, for tests."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from prometheus_client.parser import text_string_to_metric_families

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send, usage_of
from cluster.batches import BatchStore
from cluster.config import TandemConfig, parse
from cluster.errors import LinkClosedError
from cluster.gateway import BatchService, Gateway, GatewayApp, Opener, ReplicaInfo, Wiring
from cluster.gateway.builtin.drain import NodeDrains
from cluster.gateway.builtin.operations import ClusterControl
from cluster.gateway.builtin.rollouts import RolloutControl
from cluster.gateway.reporting.dashboard import ReadDecisions
from cluster.key_file import KeyFile
from cluster.link import AnswerStore, LinkServer, ResponseHead
from cluster.usage import Usage
from tests import asgi

SECRET = b"s" * 32
CHAT = "/v1/chat/completions"
REQUESTS_TOTAL = "tandem_requests_total"
ROUTES = (CHAT, "/v1/embeddings", "/v1/models", "/openapi.json", "/v1/responses/{response_id}")


class Replica:
    """Application that records its requests, and streams, waits or fails as the body says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Scope] = []
        self.bodies: list[bytes] = []
        self.arrived_s: list[float] = []
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        self.arrived_s.append(time.monotonic())
        body = await read_body(receive)
        self.bodies.append(body)
        fields: dict[str, Any] = json.loads(body) if body else {}
        try:
            if fields.get("wait_before"):
                await self.gate.wait()
            if fields.get("fail"):
                raise RuntimeError("secret internals")
            await self._answer(scope, fields, len(body), send)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _answer(self, scope: Scope, fields: dict[str, Any], size: int, send: Send) -> None:
        usage_of(scope).prompt_tokens = fields.get("prompt_tokens", 0)
        content_type = b"text/event-stream" if fields.get("stream") else b"application/json"
        headers = [(b"content-type", content_type), (b"x-engine", self.name.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if fields.get("wait_head"):
            await self.gate.wait()
        for index in range(fields.get("stream", 0)):
            event = f"data: {index}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if fields.get("wait_after"):
            await self.gate.wait()
        content = json.dumps({"replica": self.name, "path": scope["path"], "size": size}).encode()
        if scope["path"] == "/v1/models":
            content = json.dumps({"data": [{"id": self.name.split("-")[0]}]}).encode()
        if scope["path"] == "/openapi.json":
            content = json.dumps({"paths": {CHAT: {"post": {}}}}).encode()
        await send({"type": "http.response.body", "body": b"" if fields.get("stream") else content})


async def read_body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message: Message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


class World:
    """A gateway, and replicas that can be added and removed."""

    def __init__(self, gateway: Gateway, config: TandemConfig) -> None:
        self.gateway = gateway
        self.config = config
        self._idempotency = config.idempotency
        self.app = GatewayApp(gateway)
        self.servers: dict[str, LinkServer] = {}
        self.running: dict[str, dict[str, ReplicaInfo]] = {name: {} for name in gateway.pools}

    async def add(
        self, pool: str, name: str, routes: tuple[str, ...] = ROUTES, ready: int | None = None
    ) -> Replica:
        replica = Replica(name)
        await self.serve(replica, pool, name, routes, ready)
        return replica

    async def serve(
        self,
        app: ASGIApp,
        pool: str,
        name: str,
        routes: tuple[str, ...] = ROUTES,
        ready: int | None = None,
        resume_key: str = "",
        node_id: str = "",
    ) -> LinkServer:
        """Add a replica with any application; with a key, it keeps journals."""
        answers = AnswerStore(self._idempotency) if self._idempotency.keep_s else None
        server = LinkServer(app, SECRET, resumes=bool(resume_key), answers=answers)
        host, port = await server.start()
        self.servers[name] = server
        adapters = self.gateway.pools[pool].limits.adapters
        self.running[pool][name] = ReplicaInfo(
            *(name, host, port, routes, {"engine": "1"}),
            adapters=adapters,
            resume_key=resume_key,
            keeps_answers=answers is not None,
            node_id=node_id,
        )
        self.update(pool)
        expected = len(self.running[pool]) if ready is None else ready
        await self.until(lambda: self.gateway.pools[pool].replicas.num_ready == expected)
        return server

    async def kill(self, name: str) -> None:
        """End a replica's server as the death of its process does; wait until the router knows."""
        server = self.servers.pop(name)
        for connection in tuple(server.connections):
            connection.fail(LinkClosedError("killed"))
        await server.stop()
        pools = self.gateway.pools.values()
        (link,) = (r.link for p in pools for r in p.replicas.running if r.info.id == name)
        await self.until(lambda: not link.connected)

    def remove(self, pool: str, name: str) -> None:
        del self.running[pool][name]
        self.update(pool)

    def update(self, pool: str) -> None:
        self.gateway.pools[pool].update(self.running[pool].values())

    async def until_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until no request is open, also those whose usage the replica has yet to report."""
        async with asyncio.timeout(timeout_s):
            while self.gateway.num_open_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


class FallbackAnswer:
    """Answer without a link: the replica's id."""

    usage = Usage(3, 1, 2)

    def __init__(self, replica_id: str) -> None:
        self._chunks = [replica_id.encode()]

    async def head(self) -> ResponseHead:
        return ResponseHead(200, [(b"content-type", b"text/plain")])

    async def read(self) -> bytes:
        return self._chunks.pop() if self._chunks else b""

    def cancel(self) -> None:
        self._chunks.clear()


def fallback(replica_id: str) -> Opener:
    return lambda head, body: FallbackAnswer(replica_id)


@asynccontextmanager
async def gateway_world(
    key_file: KeyFile | None = None,
    scales_to_zero: bool = False,
    read_decisions: ReadDecisions | None = None,
    rollout_control: RolloutControl | None = None,
    routing: str = "prefix",
    generator: dict[str, Any] | None = None,
    classifier: dict[str, Any] | None = None,
    idempotency: dict[str, Any] | None = None,
    nodes: NodeDrains | None = None,
    control: ClusterControl | None = None,
    guards: list[dict[str, Any]] | None = None,
    batch_store: BatchStore | None = None,
    batch_clock: Callable[[], float] = time.time,
    auto: dict[str, Any] | None = None,
    more_generators: list[dict[str, Any]] | None = None,
    **router: Any,
) -> AsyncIterator[World]:
    pool: dict[str, Any] = {
        "name": "gen",
        "model": "m",
        "max_in_flight": 2,
        "routing": routing,
        **(generator or {}),
    }
    if scales_to_zero:
        pool["replicas"] = {"min": 0, "target_in_flight": 2}
    config = parse(
        {
            "generators": [pool, *(more_generators or [])],
            "classifiers": [{"name": "cls", "model": "m", **(classifier or {})}],
            "router": router,
            "idempotency": idempotency or {},
            "guards": guards or [],
            "auto": auto,
        }
    )
    wirings = {name: Wiring(SECRET, fallback=fallback) for name, _ in config.served_pools}
    batches = None
    if batch_store is not None:
        batches = BatchService(batch_store, config.router, uuid4().hex, batch_clock)
    gateway = Gateway(
        config,
        wirings,
        versions={"tandem": "0"},
        key_file=key_file,
        batches=batches,
        control=control,
        read_decisions=read_decisions,
        nodes=nodes,
        rollout_control=rollout_control,
    )
    world = World(gateway, config)
    gateway.start_batches()
    try:
        yield world
    finally:
        await world.gateway.close()
        for server in world.servers.values():
            await server.stop()


async def metrics(world: World) -> dict[tuple[str, ...], float]:
    answer = await asgi.get(world.app, "/metrics")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
