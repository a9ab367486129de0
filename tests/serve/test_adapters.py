"""LoRA adapters served as models, over real links, with simulated engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, get_args

import pytest

from cluster.admission import Identity, Tenant
from cluster.config import RoutingPolicy, parse
from cluster.engines.sim import SimEngine
from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
from cluster.gateway.messages import Request
from cluster.link import Adapters, LinkServer
from tests import asgi
from tests.serve.link_kit import SECRET, until

COMPLETION = "/v1/completions"
ROUTES = (COMPLETION, "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/models")
TEXT = "It was a dark and stormy night. " * 20


class World:
    """Simulated engines with adapters behind one router."""

    def __init__(self, adapters: str, max_loras: int, routing: str, **sim: float) -> None:
        pool = {
            "name": "m",
            "model": "none",
            "engine": "sim",
            "routing": routing,
            "adapters": {name: f"/adapters/{name}" for name in adapters.split()},
            "engine_args": {"max_loras": max_loras},
            "sim": sim,
        }
        self.config = parse({"generators": [pool]})
        self.engines: list[SimEngine] = []
        self.servers: list[LinkServer] = []
        self.infos: list[ReplicaInfo] = []
        self.gateway = Gateway(self.config, {"m": Wiring(SECRET)})

    async def ask(self, model: str, path: str = COMPLETION, **fields: Any) -> asgi.Answer:
        prompt = {"prompt": TEXT} if path == COMPLETION else {}
        body = {"model": model, "max_tokens": 2, **prompt, **fields}
        return await asgi.call(GatewayApp(self.gateway), "POST", path, body)

    async def deploy(self, adapters: dict[str, str], failing: Collection[int] = ()) -> None:
        """Change the adapters of the pool; these replicas cannot load the new ones."""
        fields = self.config.model_dump(mode="json")
        fields["generators"][0]["adapters"] = adapters
        config = parse(fields)
        for number, (engine, server) in enumerate(zip(self.engines, self.servers, strict=True)):
            if number in failing:
                failed = dict.fromkeys(
                    adapters.keys() - engine.adapters.loaded.keys(), "wrong rank"
                )
                server.set_adapters(Adapters(engine.adapters.loaded, failed))
            else:
                await engine.reconfigure(config.generators[0])
                server.set_adapters(engine.adapters)
        self.gateway.reconfigure(config, None, needs_keys=False)

    async def status(self) -> dict[str, Any]:
        ready = await asgi.get(GatewayApp(self.gateway), "/ready")
        adapters: dict[str, Any] = ready.json()["pools"]["m"]["adapters"]
        return adapters

    def served(self) -> list[int]:
        return [engine.num_accepted for engine in self.engines]


@asynccontextmanager
async def a_world(
    replicas: int,
    adapters: str,
    max_loras: int,
    *,
    old_replicas: int = 0,
    routing: str = "prefix",
    **sim: float,
) -> AsyncIterator[World]:
    """Run replicas, of which the first ``old_replicas`` have no adapters."""
    world = World(adapters, max_loras, routing, **sim)
    new = world.config.generators[0]
    old = new.model_copy(update={"adapters": {}})
    async with AsyncExitStack() as stack:

        def later(close: Callable[[], Awaitable[None]]) -> None:
            stack.push_async_callback(close)

        for number in range(replicas):
            config = old if number < old_replicas else new
            engine = SimEngine(config)
            await engine.start()
            later(engine.stop)
            world.engines.append(engine)
            server = LinkServer(engine.app, SECRET, prefixes=engine.prefixes)
            host, port = await server.start()
            server.set_adapters(engine.adapters)
            world.servers.append(server)
            metadata = ReplicaInfo(
                *("", host, port, ROUTES),
                adapters=tuple(config.adapters),
                reports_adapters=number >= old_replicas,
            ).to_metadata()
            world.infos.append(ReplicaInfo.from_metadata(f"r{number}", metadata))
            later(server.stop)
        later(world.gateway.close)
        pool = world.gateway.pools["m"]
        pool.update(world.infos)
        async with asyncio.timeout(30):
            await until(lambda: pool.replicas.num_ready == replicas)
            yield world


async def test_adapter_is_listed_and_served_as_a_model() -> None:
    async with a_world(1, "law art", max_loras=2) as world:
        app = GatewayApp(world.gateway)
        cards = (await asgi.get(app, "/v1/models")).json()["data"]
        found = [(card["id"], card["root"], card["parent"]) for card in cards]
        assert found == [
            ("m", "m", None),
            ("law", "law", "m"),  # not the paths of their files
            ("art", "art", "m"),
        ]
        assert (await asgi.get(app, "/v1/models/law")).json()["parent"] == "m"
        user = [{"role": "user", "content": "Hi"}]
        asked: list[tuple[str, dict[str, Any]]] = [
            (COMPLETION, {}),
            ("/v1/chat/completions", {"messages": user}),
            ("/v1/messages", {"messages": user}),
            ("/v1/responses", {"input": "Hi"}),
        ]
        for path, fields in asked:
            answer = await world.ask("law", path, **fields)
            assert (answer.status, answer.json()["model"]) == (200, "law")
        unknown = await world.ask("tax")
        assert unknown.status == 404
        assert "Known models: art, law, m" in unknown.json()["error"]["message"]
        metrics = (await asgi.get(app, "/metrics")).body.decode()
        assert 'tandem_requests_total{model="m"' in metrics
        assert "tax" not in metrics


async def test_adapters_are_added_and_removed_while_replicas_run() -> None:
    async with a_world(2, "law", max_loras=2) as world:
        assert (await world.ask("art")).status == 404
        await world.deploy({"law": "/adapters/law", "art": "/adapters/art"})
        assert [(await world.ask(name)).status for name in ("law", "art", "m")] == [200] * 3
        assert await world.status() == {
            name: {"replicas": 2, "errors": []} for name in ("law", "art")
        }
        await world.deploy({"art": "/adapters/art"})
        assert [(await world.ask(name)).status for name in ("law", "art", "m")] == [404, 200, 200]


async def test_a_replica_that_cannot_load_an_adapter_gets_no_requests_for_it() -> None:
    async with a_world(2, "law", max_loras=2, routing="round-robin") as world:
        both = {"law": "/adapters/law", "art": "/adapters/art"}
        await world.deploy(both, failing=[0])
        async with asyncio.timeout(60):
            while not (await world.status())["art"]["errors"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [(await world.ask("art")).status for _ in range(6)] == [200] * 6
        assert world.served() == [0, 6]
        assert (await world.status())["art"] == {"replicas": 1, "errors": ["wrong rank"]}
        world.gateway.pools["m"].update(world.infos[:1])
        refused = await world.ask("art")
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0
        assert (await world.ask("law")).status == 200


async def test_key_can_allow_an_adapter() -> None:
    async with a_world(1, "law art", max_loras=2) as world:
        identity = Identity(Tenant("t"), models=frozenset({"law"}))

        async def ask(
            path: str, body: bytes = b"", kind: str = "application/json"
        ) -> tuple[int, bytes]:
            headers = [(b"content-type", kind.encode())]
            method = "POST" if body else "GET"
            request = Request("id", method, path, b"", headers, body, identity=identity)
            response = await world.gateway.respond(request)
            return response.status, b"".join([chunk async for chunk in response.body])

        for model, status in (("law", 200), ("art", 403), ("m", 403)):
            body = f'{{"model": "{model}", "prompt": "Hi", "max_tokens": 1}}'.encode()
            assert (await ask(COMPLETION, body))[0] == status
            assert (await ask(COMPLETION, body, "Application/JSON"))[0] == status
            # A body that the router does not read may name any model.
            assert (await ask(COMPLETION, body, "application/octet-stream"))[0] == 403
            assert (await ask(COMPLETION, body, "multipart/form-data; boundary=x"))[0] == 400
        _, listed = await ask("/v1/models")
        assert [name for name in ("law", "art", "m") if f'"id":"{name}"'.encode() in listed] == [
            "law"
        ]


async def test_requests_of_an_adapter_go_to_one_replica() -> None:
    async with a_world(3, "law art tax", max_loras=1, adapter_load_s=0.01) as world:
        for _ in range(4):
            for model in ("law", "art", "tax"):
                assert (await world.ask(model)).status == 200
        loaded = [engine.loaded_adapters for engine in world.engines]
        assert sorted(name for names in loaded for name in names) == ["art", "law", "tax"]
        assert world.served() == [4, 4, 4]


async def test_busy_adapter_spreads_over_replicas() -> None:
    async with a_world(3, "law art", max_loras=1, prefill_s_per_token=0.0002) as world:
        assert (await world.ask("law")).status == 200
        prompts = [f"{number} {TEXT}" for number in range(60)]
        answers = await asyncio.gather(*(world.ask("law", prompt=each) for each in prompts))
        assert {answer.status for answer in answers} == {200}
        assert min(world.served()) > 0


async def test_adapters_do_not_affect_routing_if_all_fit() -> None:
    for max_loras, wanted in ((1, "law"), (2, None)):
        async with a_world(0, "law art", max_loras) as world:
            pool = world.gateway.pools["m"]
            assert (pool.needs_adapter("law"), pool.needs_adapter("m")) == (wanted, None)


@pytest.mark.parametrize("routing", get_args(RoutingPolicy))
async def test_rolling_update_routes_only_to_replicas_with_the_adapter(
    routing: str,
) -> None:
    async with a_world(3, "law", max_loras=1, old_replicas=2, routing=routing) as world:
        answers = await asyncio.gather(*(world.ask("law") for _ in range(12)))
        assert {answer.status for answer in answers} == {200}
        assert world.served() == [0, 0, 12]
        answers = await asyncio.gather(*(world.ask("m", prompt=f"{n} {TEXT}") for n in range(12)))
        assert {answer.status for answer in answers} == {200}
        assert max(world.served()[:2]) > 0


async def test_missing_adapter_gets_retry_after() -> None:
    async with a_world(1, "law", max_loras=1, old_replicas=1) as world:
        answer = await world.ask("law")
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "`law`" in answer.json()["error"]["message"]
        assert (await world.ask("m")).status == 200


async def test_adapter_request_does_not_block_the_queue_if_only_other_replicas_have_room() -> None:
    async with a_world(2, "law", max_loras=1, old_replicas=1, decode_s_per_token=0.05) as world:
        pool = world.gateway.pools["m"]
        pool.replicas.fleet.set_capacity("r1", 1)
        long = asyncio.create_task(world.ask("law", max_tokens=100))
        await until(lambda: world.served()[1] == 1)
        answer = await world.ask("law")
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert (await world.ask("m")).status == 200
        long.cancel()
        await asyncio.wait([long])


async def test_replica_of_unknown_adapters_may_have_all() -> None:
    metadata = ReplicaInfo("r0", "127.0.0.1", 1, adapters=("law",)).to_metadata()
    assert not ReplicaInfo.from_metadata("r0", metadata).lacks_adapter("law")
    assert ReplicaInfo.from_metadata("r0", metadata).lacks_adapter("art")
    del metadata["adapters"]
    assert not ReplicaInfo.from_metadata("r0", metadata).lacks_adapter("law")


async def test_queued_adapter_request_fails_when_no_replica_has_the_adapter() -> None:
    async with a_world(2, "law", max_loras=1, old_replicas=1, decode_s_per_token=0.05) as world:
        pool = world.gateway.pools["m"]
        for replica in ("r0", "r1"):
            pool.replicas.fleet.set_capacity(replica, 1)
        longs = [asyncio.create_task(world.ask("law", max_tokens=100))]
        await until(lambda: world.served() == [0, 1])  # leaves room only at the other replica
        longs.append(asyncio.create_task(world.ask("m", max_tokens=100)))
        await until(lambda: world.served() == [1, 1])
        waits = asyncio.create_task(world.ask("law"))
        await until(lambda: pool.num_queued == 1)
        behind = asyncio.create_task(world.ask("m"))
        await until(lambda: pool.num_queued == 2)
        pool.update(world.infos[:1])
        assert (await waits).status == 503
        assert (await behind).status == 200
        for long in longs:
            long.cancel()
        await asyncio.wait(longs)
