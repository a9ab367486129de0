"""Routers' view of replicas' prefix caches, over real links, with simulated engines."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import GeneratorConfig, parse
from cluster.engines.sim import SimEngine
from cluster.errors import LinkClosedError, LinkProtocolError
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.link import LinkClient, LinkOptions, LinkServer, PrefixEvents
from cluster.link.frames import PREFIXES, encode_frame, encode_prefixes
from cluster.routing import fingerprint
from tests import asgi
from tests.serve.link_kit import SECRET, RawPeer, echo, on_both_loops, raw_server, until

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
SYSTEM = "You are a careful assistant who answers in short sentences. " * 20


class Source:
    """Prefix cache controlled by the test."""

    def __init__(self) -> None:
        self.held: dict[int, None] = {}
        self.on_change: Callable[[], None] | None = None
        self._events: list[PrefixEvents] = []

    def take_events(self) -> PrefixEvents | None:
        stored = [h for e in self._events for h in e.stored]
        removed = [h for e in self._events for h in e.removed if h not in self.held]
        self._events.clear()
        return PrefixEvents(stored, removed) if stored or removed else None

    def snapshot(self) -> Sequence[int]:
        return list(self.held)

    def change(self, stored: Sequence[int] = (), removed: Sequence[int] = ()) -> None:
        for prefix in removed:
            del self.held[prefix]
        self.held |= dict.fromkeys(stored)
        self._events.append(PrefixEvents(stored, removed))
        if self.on_change is not None:
            self.on_change()


class Router:
    """A link and its router's prefix index."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.held: set[int] = set()
        self.cleared = 0
        self.link = LinkClient(*address, SECRET)
        self.link.on_prefixes = self.take

    def take(self, events: PrefixEvents) -> None:
        self.cleared += events.cleared
        self.held = set() if events.cleared else self.held
        self.held -= set(events.removed)
        self.held |= set(events.stored)


@asynccontextmanager
async def routers(server: LinkServer, count: int) -> AsyncIterator[list[Router]]:
    made = [Router(server.address) for _ in range(count)]
    try:
        for router in made:
            await router.link.connect()
        yield made
    finally:
        for router in made:
            await router.link.close()


@asynccontextmanager
async def serving(source: Source, port: int = 0) -> AsyncIterator[LinkServer]:
    server = LinkServer(echo, SECRET, prefixes=source, port=port)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@on_both_loops
async def test_late_router_receives_the_same_state() -> None:
    source = Source()
    source.change(range(100))
    async with serving(source) as server, routers(server, 2) as early:
        await until(lambda: all(len(r.held) == 100 for r in early))
        source.change([1000], range(50))
        source.change(range(25))
        async with routers(server, 1) as late:
            everyone = [*early, *late]
            await until(lambda: all(r.held == set(source.held) for r in everyone))
            source.change((), [1000])
            await until(lambda: all(r.held == set(source.held) for r in everyone))
            assert [r.cleared for r in everyone] == [1, 1, 1]


@on_both_loops
async def test_large_cache_arrives_complete_in_several_frames() -> None:
    source = Source()
    source.change(range(100_000))
    async with serving(source) as server, routers(server, 1) as (router,):
        await until(lambda: router.held == set(source.held))
        assert router.link.counts.frames_received >= 13
        source.change([], range(60_000))
        await until(lambda: router.held == set(source.held))


@on_both_loops
async def test_restarted_replica_replaces_its_old_state() -> None:
    source = Source()
    source.change(range(10))
    async with serving(source) as server:
        port = server.address[1]
        async with routers(server, 1) as (router,):
            await until(lambda: router.held == set(range(10)))
            await server.stop()
            fresh = Source()
            fresh.change([77])
            async with serving(fresh, port):
                await until(lambda: router.held == {77})


@on_both_loops
async def test_reopened_link_starts_with_the_full_state() -> None:
    source = Source()
    source.change(range(10))
    async with serving(source) as server, routers(server, 1) as (router,):
        await until(lambda: len(router.held) == 10)
        for connection in list(server.connections):
            connection.fail(LinkClosedError("lost"))
        source.change([11], [1, 2])
        await until(lambda: router.held == set(source.held))
        assert router.cleared == 2


@on_both_loops
async def test_slow_router_catches_up() -> None:
    source = Source()
    options = LinkOptions(dead_after_s=30, silent_after_s=30)
    server = LinkServer(echo, SECRET, prefixes=source, options=options)
    await server.start()
    router = Router(server.address)
    try:
        await router.link.connect()
        await until(lambda: router.cleared == 1)
        (connection,) = server.connections
        connection.pause_writing()  # as the transport does when its buffer is full
        for start in range(0, 30_000, 1000):
            source.change(range(start, start + 1000), range(max(0, start - 1000), start))
            server.send_prefixes()
        assert not connection.unsent_bytes  # nothing is buffered
        connection.resume_writing()
        await until(lambda: router.held == set(source.held))
        assert router.cleared == 2
    finally:
        await router.link.close()
        await server.stop()


@on_both_loops
async def test_frames_out_of_order_close_the_connection() -> None:
    async def replica(peer: RawPeer) -> None:
        await peer.shake("server")
        first = encode_prefixes(0, PrefixEvents((1,), cleared=True))
        third = encode_prefixes(2, PrefixEvents((2,)))
        for payload in (first, third):
            peer.writer.write(encode_frame(0, PREFIXES, 0, payload))
        await peer.wait_closed_by_peer()

    async with raw_server(replica) as address:
        router = Router(address)
        router.link.start()
        await until(lambda: isinstance(router.link.last_error, LinkProtocolError))
        assert router.held == {1}
        await router.link.close()


# -- routers and simulated engines -----------------------------------------------------------------


class Cluster:
    """Simulated engines behind links, with several routers."""

    def __init__(self) -> None:
        self.engines: dict[str, SimEngine] = {}
        self.servers: dict[str, LinkServer] = {}
        self.gateways: list[Gateway] = []
        self.asked: dict[int, None] = {}

    async def add(self, name: str, **sim: float) -> None:
        config = {"name": "m", "model": "none", "engine": "sim", "sim": sim}
        self.engines[name] = engine = SimEngine(GeneratorConfig.model_validate(config))
        await engine.start()
        self.servers[name] = server = LinkServer(engine.app, SECRET, prefixes=engine.prefixes)
        await server.start()

    async def remove(self, name: str) -> None:
        await self.servers.pop(name).stop()
        await self.engines.pop(name).stop()

    async def add_router(self) -> None:
        pool = {"name": "m", "model": "none", "engine": "sim"}
        gateway = Gateway(parse({"generators": [pool]}), {"m": Wiring(SECRET)})
        self.gateways.append(gateway)
        await self.update()

    async def update(self) -> None:
        for gateway in self.gateways:
            pool = gateway.pools["m"]
            pool.update(
                ReplicaInfo(name, *server.address, (CHAT, COMPLETION))
                for name, server in self.servers.items()
            )
        pools = [gateway.pools["m"] for gateway in self.gateways]
        await until(lambda: all(pool.replicas.num_ready == len(self.servers) for pool in pools))

    async def ask(self, router: int, path: str = COMPLETION, **fields: object) -> asgi.Answer:
        body = {"model": "m", "max_tokens": 2, **fields}
        self.asked |= dict.fromkeys(fingerprint(path, json.dumps(body).encode()).hashes)
        return await asgi.call(GatewayApp(self.gateways[router]), "POST", path, body)

    async def settle(self) -> None:
        """Wait until every router's index equals the contents of every engine's cache."""
        await until(lambda: all(self._believed(gateway) for gateway in self.gateways))

    def _believed(self, gateway: Gateway) -> bool:
        index = gateway.pools["m"].replicas.prefixes
        index.advance(1e9)  # drops entries that are expected but not reported
        held = {name: set(engine.prefixes.snapshot()) for name, engine in self.engines.items()}
        return all(
            {p for p in self.asked if index.count(name, [p])} == mine for name, mine in held.items()
        )

    def cached_tokens(self, router: int) -> float:
        return self.gateways[router].pools["m"].meter.cached_tokens.value


@asynccontextmanager
async def a_cluster(replicas: int, routers: int, **sim: float) -> AsyncIterator[Cluster]:
    cluster = Cluster()
    async with AsyncExitStack() as stack:
        for number in range(replicas):
            await cluster.add(f"r{number}", **sim)
        for _ in range(routers):
            await cluster.add_router()

        async def close() -> None:
            for gateway in cluster.gateways:
                await gateway.close()
            for name in list(cluster.servers):
                await cluster.remove(name)

        stack.push_async_callback(close)
        async with asyncio.timeout(30):
            yield cluster


async def test_router_finds_a_prefix_that_another_router_placed() -> None:
    async with a_cluster(replicas=4, routers=2) as cluster:
        system = {"role": "system", "content": SYSTEM}
        for word in ("one", "two", "three"):
            messages = [system, {"role": "user", "content": word}]
            answer = await cluster.ask(0, CHAT, messages=messages)
            assert answer.status == 200
        await cluster.settle()
        messages = [system, {"role": "user", "content": "four"}]
        await cluster.ask(1, CHAT, messages=messages)
        assert cluster.cached_tokens(1) > 250


async def test_routers_converge_on_the_engines_caches() -> None:
    async with a_cluster(replicas=3, routers=2, num_kv_blocks=40, block_size_tokens=8) as cluster:
        for number in range(30):
            prompt = f"Story {number % 12}. " + "It was a dark and stormy night. " * 10
            assert (await cluster.ask(number % 2, prompt=prompt)).status == 200
            await cluster.settle()
        assert all(g.pools["m"].replicas.prefix_counts.removed for g in cluster.gateways)


async def test_removed_replica_is_forgotten_and_new_router_learns_all() -> None:
    async with a_cluster(replicas=2, routers=1) as cluster:
        await cluster.ask(0, prompt=SYSTEM)
        await cluster.settle()
        (holder,) = [n for n, e in cluster.engines.items() if e.prefixes.snapshot()]
        held = cluster.engines[holder].prefixes.snapshot()
        await cluster.add_router()
        await cluster.settle()
        index = cluster.gateways[1].pools["m"].replicas.prefixes
        assert index.count(holder, held) == len(held)
        await cluster.remove(holder)
        await cluster.update()
        assert index.match(held) == {}
        assert (await cluster.ask(1, prompt=SYSTEM)).status == 200


async def test_token_id_prompts_are_counted_exactly() -> None:
    async with a_cluster(replicas=3, routers=1, block_size_tokens=16) as cluster:
        ids = list(range(1000, 1400))
        for _ in range(3):
            await cluster.ask(0, prompt=ids)
        assert cluster.cached_tokens(0) == 2 * 384


async def test_prefix_metrics() -> None:
    async with a_cluster(replicas=1, routers=1) as cluster:
        await cluster.ask(0, prompt=SYSTEM)
        await cluster.settle()
        answer = await asgi.call(GatewayApp(cluster.gateways[0]), "GET", "/metrics")
        text = answer.body.decode()
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        held = len(cluster.engines["r0"].prefixes.snapshot())
        assert held > 5
        assert found["tandem_prefix_index_entries", "m"] == held
        assert found["tandem_prefix_events_total", "stored", "m"] == held
        assert found["tandem_prefix_events_total", "cleared", "m"] == 1


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"prompt": [[1], "a"]}', b'{"prompt": 3}'])
async def test_invalid_body_reaches_the_engine(body: bytes) -> None:
    async with a_cluster(replicas=1, routers=1) as cluster:
        answer = await asgi.call(GatewayApp(cluster.gateways[0]), "POST", COMPLETION, body)
        assert answer.status == 400
        assert "error" in json.loads(answer.body)
