"""No request is lost to replicas with false reports, slow or removed replicas, or clock jumps.

Gateway, links and simulated engines run in virtual time, about 60 times as fast as real time.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest

from benchmarks.overload.virtual_time import VirtualLoop, virtual_time
from cluster.config import GeneratorConfig, RoutingPolicy, parse
from cluster.engines.sim import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.link import LinkServer, PrefixEvents
from cluster.load import Load
from cluster.routing import fingerprint
from tests import asgi
from tests.serve.link_kit import SECRET, until

PATH = "/v1/completions"
STEP_S, TOKENS, SEQUENCES = 0.02, 20, 8
POLICIES: tuple[RoutingPolicy, ...] = ("prefix", "least-load", "round-robin")

Tell = Callable[[SimEngine], Load]


class FalseCacheClaims:
    """Prefix cache that claims every prompt and holds none."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] | None = None
        self._all = [h for n in range(8) for h in fingerprint(PATH, body(n)).hashes]

    def take_events(self) -> PrefixEvents | None:
        return None

    def snapshot(self) -> Sequence[int]:
        return self._all


def body(number: int) -> bytes:
    prompt = f"Document {number % 8}. " + "It was a long and quiet day. " * 40
    return b'{"model": "m", "max_tokens": %d, "prompt": "%b"}' % (TOKENS, prompt.encode())


class Fleet:
    """A gateway and its simulated replicas."""

    def __init__(self, policy: RoutingPolicy) -> None:
        pool = {"name": "m", "model": "none", "engine": "sim", "routing": policy}
        self.gateway = Gateway(parse({"generators": [pool]}), {"m": Wiring(SECRET)})
        self.engines: dict[str, SimEngine] = {}
        self.given: Counter[str] = Counter()
        """Requests received by each replica."""
        self._servers: dict[str, LinkServer] = {}
        self._app = GatewayApp(self.gateway)

    async def add(
        self, name: str, slowness: float = 1.0, load: Tell = SimEngine.load, boasts: bool = False
    ) -> None:
        sim = {
            "decode_s_per_token": STEP_S * slowness,
            "prefill_s_per_token": 1e-4,
            "max_num_seqs": SEQUENCES,
        }
        config = {"name": "m", "model": "none", "engine": "sim", "sim": sim}
        engine = self.engines[name] = SimEngine(GeneratorConfig.model_validate(config))
        await engine.start()

        async def app(*call: Any) -> None:
            self.given[name] += 1
            await engine.app(*call)

        server = LinkServer(
            app,
            SECRET,
            load=lambda: load(engine),
            prefixes=FalseCacheClaims() if boasts else engine.prefixes,
        )
        await server.start()
        self._servers[name] = server
        await self._update()

    async def remove(self, name: str) -> None:
        server = self._servers.pop(name)
        await self._update()
        await server.drain(60.0)
        await server.stop()
        await self.engines.pop(name).stop()

    async def _update(self) -> None:
        pool = self.gateway.pools["m"]
        pool.update(ReplicaInfo(n, *s.address, (PATH,)) for n, s in self._servers.items())
        await until(lambda: pool.replicas.num_ready == len(self._servers))

    async def flood(self, num: int, rate: float) -> Counter[int]:
        """Send requests at a constant rate; return their statuses, and check for leftovers."""
        draw = random.Random(3)
        calls = []
        for number in range(num):
            calls.append(asyncio.ensure_future(self.ask(number)))
            await asyncio.sleep(draw.expovariate(rate))
        async with asyncio.timeout(1e6):
            statuses = Counter(await asyncio.gather(*calls))
        pool = self.gateway.pools["m"]
        assert (pool.num_in_flight, pool.num_queued, pool.queue.capacity.in_flight) == (0, 0, 0)
        assert pool.queue.queued_tokens == pool.queue.capacity.in_flight_tokens == 0
        return statuses

    async def ask(self, number: int, *, stream: bool = False) -> int:
        content = body(number)
        if stream:
            content = b'{"stream": true, ' + content[1:]
        call = asgi.start(self._app, "POST", PATH, content)
        return (await call.done(timeout_s=1e6)).status

    async def close(self) -> None:
        await self.gateway.close()
        for server in self._servers.values():
            await server.stop()
        for engine in self.engines.values():
            await engine.stop()


@asynccontextmanager
async def a_fleet(policy: RoutingPolicy, num: int = 0) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        fleet = Fleet(policy)
        stack.push_async_callback(fleet.close)
        for number in range(num):
            await fleet.add(f"r{number}")
        yield fleet


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with virtual_time() as runner:
        runner.run(scenario())


LIES: dict[str, Tell] = {
    "nothing": lambda _: Load(),
    "idle for ever": lambda engine: Load(engine.load().running, 0, 0.0),
    "full": lambda _: Load(0, 1_000_000, 1.0),
    "nonsense": lambda _: Load(
        random.randrange(10**6), random.randrange(10**6), random.random() * 10
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lie", LIES)
def test_false_load_reports(policy: RoutingPolicy, lie: str) -> None:
    async def scenario() -> None:
        async with a_fleet(policy, 2) as fleet:
            await fleet.add("liar", load=LIES[lie])
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert await fleet.flood(300, rate=50) == {200: 300}
            # The two correct replicas alone need 7.5 s for all requests.
            assert loop.time() - began < 12

    run(scenario)


def test_free_slots_are_known_if_each_replica_reports_its_own() -> None:
    async def scenario() -> None:
        async with a_fleet("least-load", 2) as fleet:
            replicas = fleet.gateway.pools["m"].replicas
            await until(lambda: replicas.engine_slots() == (2 * SEQUENCES, 2 * SEQUENCES))
            calls = [asyncio.ensure_future(fleet.ask(number)) for number in range(3)]
            await until(lambda: replicas.engine_slots() == (2 * SEQUENCES, 2 * SEQUENCES - 3))
            await fleet.add("older", load=lambda engine: Load(engine.load().running))
            await until(lambda: len(replicas.loads) == 3)
            assert replicas.engine_slots() is None
            assert await asyncio.gather(*calls) == [200] * 3

    run(scenario)


def test_requests_of_other_routers_take_slots() -> None:
    async def scenario() -> None:
        async with a_fleet("least-load", 1) as fleet, a_fleet("least-load") as other:
            other._servers = dict(fleet._servers)
            await other._update()
            replicas = fleet.gateway.pools["m"].replicas
            calls = [asyncio.ensure_future(other.ask(number)) for number in range(3)]
            await until(lambda: replicas.engine_slots() == (SEQUENCES, SEQUENCES - 3))
            assert await asyncio.gather(*calls) == [200] * 3
            await until(lambda: replicas.engine_slots() == (SEQUENCES, SEQUENCES))
            other._servers.clear()

    run(scenario)


@pytest.mark.parametrize("policy", ["prefix", "least-load"])
def test_false_cache_claims(policy: RoutingPolicy) -> None:
    async def scenario() -> None:
        async with a_fleet(policy, 2) as fleet:
            await fleet.add("boaster", boasts=True)
            assert await fleet.flood(300, rate=40) == {200: 300}
            assert fleet.given["boaster"] < 200

    run(scenario)


@pytest.mark.parametrize("policy", ["prefix", "least-load", "power-of-two"])
def test_slow_replica(policy: RoutingPolicy) -> None:
    async def scenario() -> None:
        async with a_fleet(policy, 3) as fleet:
            await fleet.add("slow", slowness=10.0)
            assert await fleet.flood(600, rate=40) == {200: 600}
            assert fleet.given["slow"] < 600 / 4 / 2

    run(scenario)


@pytest.mark.parametrize("policy", ["round-robin", "least-load"])
def test_a_slow_replica_is_taken_out(policy: RoutingPolicy) -> None:
    async def scenario() -> None:
        async with a_fleet(policy, 3) as fleet:
            await fleet.add("slow", slowness=20.0)
            assert await fleet.flood(600, rate=40) == {200: 600}
            replicas = fleet.gateway.pools["m"].replicas
            assert replicas.guard.circuit("slow").is_out
            assert not any(replicas.guard.circuit(f"r{number}").is_out for number in range(3))
            before = fleet.given["slow"]
            assert await fleet.flood(400, rate=40) == {200: 400}
            assert fleet.given["slow"] - before <= 3  # trials, in ten seconds

    run(scenario)


def test_a_hung_replica_is_taken_out() -> None:
    async def scenario() -> None:
        async with a_fleet("round-robin", 3) as fleet:
            await fleet.add("hung", slowness=1e4)
            calls = []
            for number in range(200):
                calls.append(asyncio.ensure_future(fleet.ask(number, stream=True)))
                await asyncio.sleep(0.1)
            assert fleet.gateway.pools["m"].replicas.guard.circuit("hung").is_out
            assert fleet.given["hung"] < 40
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    run(scenario)


@pytest.mark.parametrize("jump_s", [-1000.0, 3.0, 30.0, 1000.0])
def test_clock_jumps(jump_s: float) -> None:
    async def scenario() -> None:
        async with a_fleet("prefix", 2) as fleet:
            loop = cast(VirtualLoop, asyncio.get_running_loop())
            flood = asyncio.ensure_future(fleet.flood(200, rate=30))
            for _ in range(3):
                await asyncio.sleep(1.0)
                loop.advance(jump_s)
            assert await flood == {200: 200}

    run(scenario)


@pytest.mark.parametrize("policy", POLICIES)
def test_scaling_from_zero_and_back(policy: RoutingPolicy) -> None:
    async def scenario() -> None:
        async with a_fleet(policy) as fleet:
            flood = asyncio.ensure_future(fleet.flood(100, rate=10))
            await asyncio.sleep(2.0)
            assert fleet.gateway.pools["m"].num_queued > 0
            await fleet.add("first")
            await asyncio.sleep(2.0)
            await fleet.add("second")
            await fleet.remove("first")
            await fleet.remove("second")
            await asyncio.sleep(2.0)
            await fleet.add("third")
            assert await flood == {200: 100}

    run(scenario)
