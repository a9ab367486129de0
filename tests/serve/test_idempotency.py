"""Requests that are repeated with the same `Idempotency-Key`, at the same and at another router."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from cluster.admission import Identity, Tenant
from cluster.client.repeating import read_all
from cluster.client.transport import Transport
from cluster.config import IdempotencyConfig
from cluster.errors import LinkClosedError, UnavailableError
from cluster.gateway import GatewayApp
from cluster.gateway.admission.answer_keys import AnswerKeys
from cluster.gateway.messages import Request
from cluster.link import AnswerKey, LinkServer
from tests import asgi
from tests.serve.gateway_kit import CHAT, Replica, World, gateway_world, metrics
from tests.serve.link_kit import SECRET
from tests.serve.test_client_transport import FakeHandle
from tests.serve.test_handover import ANSWER, BODY, Script
from tests.serve.test_handover_engines import add_replica, start_engine

KEY = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
REPLAYED = "idempotent-replayed"


def share(world: World, other: World) -> None:
    """Let another router use the replicas of a world."""
    for pool, infos in world.running.items():
        other.running[pool] = infos
        other.update(pool)


@asynccontextmanager
async def routers(*replicas: Script, **options: Any) -> AsyncIterator[tuple[World, World]]:
    """Start two routers of the same replicas."""
    async with gateway_world(routing="least-load", **options) as first:
        for number, replica in enumerate(replicas, 1):
            await first.serve(replica, "gen", f"gen-{number}", resume_key="k")
        async with gateway_world(routing="least-load", **options) as second:
            share(first, second)
            pool = second.gateway.pools["gen"]
            await second.until(lambda: pool.replicas.num_ready == len(replicas))
            yield first, second


def send(world: World, body: Any = BODY, path: str = CHAT, **headers: str) -> asgi.Call:
    return asgi.start(world.app, "POST", path, body, KEY | headers)


async def lose(router: World, call: asgi.Call) -> None:
    """End a router's links as its death does; the client gets no complete answer."""
    await router.gateway.close()
    with suppress(ConnectionResetError):
        await call.done()
    assert call.answer.body != ANSWER


async def tokens(*worlds: World) -> tuple[float, float]:
    """Return the prompt and completion tokens that all routers have counted."""
    prompt = completion = 0.0
    for world in worlds:
        counts = await metrics(world)
        prompt += counts.get(("tandem_prompt_tokens_total", "gen"), 0)
        completion += counts.get(("tandem_completion_tokens_total", "gen"), 0)
    return prompt, completion


async def replays(world: World) -> Counter[str]:
    """Return a router's counts of requests whose key had been used, by outcome."""
    counts = await metrics(world)
    found: Counter[str] = Counter()
    for (name, *labels), number in counts.items():
        if name == "tandem_idempotent_replays_total" and number:
            found[labels[1]] += int(number)
    return found


@pytest.mark.parametrize("stop_at", [1, 7, 14])
async def test_an_answer_survives_the_death_of_its_router(stop_at: int) -> None:
    replica = Script(stop_at=stop_at)
    async with routers(replica, replica) as (first, second):
        call = send(first)
        await replica.stopped.wait()
        await call.chunks(1)
        await lose(first, call)
        retry = send(second)
        await retry.chunks(1)
        replica.go_on.set()
        answer = await retry.done()
        assert answer.body == ANSWER
        assert answer.headers[REPLAYED] == "true"
        assert len(replica.bodies) == 1
        await second.until_idle()
        assert await tokens(second) == (7, 12 + 4)


async def test_a_finished_answer_is_replayed_at_any_router() -> None:
    replica = Script()
    async with routers(replica, replica) as (first, second):
        answer = await send(first).done()
        assert answer.body == ANSWER
        assert REPLAYED not in answer.headers
        for world in (first, second):
            again = await send(world).done()
            assert again.body == ANSWER
            headers = {**again.headers, "x-request-id": answer.headers["x-request-id"]}
            assert headers == {**answer.headers, REPLAYED: "true"}
        assert len(replica.bodies) == 1
        await second.until_idle()
        assert await tokens(first, second) == (7, 16)
        assert await replays(first) == await replays(second) == {"finished": 1}


async def test_simultaneous_requests_share_one_answer() -> None:
    replica = Script(stop_at=3)
    async with routers(replica, replica) as (first, second):
        calls = [send(first), send(first)]
        await replica.stopped.wait()
        calls += [send(second), send(second)]
        replica.go_on.set()
        answers = [await call.done() for call in calls]
        assert {answer.body for answer in answers} == {ANSWER}
        assert sum(REPLAYED in answer.headers for answer in answers) == 3
        assert len(replica.bodies) == 1
        for world in (first, second):
            await world.until_idle()
        assert await tokens(first, second) == (7, 16)
        counts = [await replays(first), await replays(second)]
        assert [sum(found.values()) for found in counts] == [1, 2]


async def test_routers_that_begin_at_the_same_moment_agree_on_one_answer() -> None:
    one, two = Script(stop_at=0), Script(stop_at=0)
    async with gateway_world() as first, gateway_world() as second:
        await first.serve(two, "gen", "gen-2", resume_key="k")
        await second.serve(one, "gen", "gen-1", resume_key="k")
        calls = [send(first), send(second)]
        await two.stopped.wait()
        await one.stopped.wait()
        second.running["gen"] |= first.running["gen"]
        second.update("gen")
        share(second, first)  # each learns of the other's answer
        await first.until(lambda: two.num_cancelled == 1)
        one.go_on.set()
        answers = [await call.done() for call in calls]
        assert [answer.body for answer in answers] == [ANSWER, ANSWER]
        assert [REPLAYED in answer.headers for answer in answers] == [True, False]
        for world in (first, second):
            await world.until_idle()
        assert await tokens(first, second) == (7, 16)
        assert await replays(first) == {"joined": 1}
        assert await replays(second) == {}


async def test_a_queued_request_joins_the_answer_that_another_router_began() -> None:
    one, two = Script(stop_at=0), Replica("gen-2")
    async with gateway_world() as first, gateway_world(routing="least-load") as second:
        await first.serve(one, "gen", "gen-1", resume_key="k")
        await second.serve(two, "gen", "gen-2")
        busy = [
            asgi.start(second.app, "POST", CHAT, {"model": "gen", "wait_before": True})
            for _ in range(2)
        ]
        await second.until(lambda: len(two.bodies) == 2)
        queued = send(second)
        await second.until(lambda: second.gateway.pools["gen"].num_queued == 1)
        began = send(first)
        await one.stopped.wait()
        second.running["gen"] |= first.running["gen"]
        second.update("gen")
        one.go_on.set()
        assert (await queued.done()).body == (await began.done()).body == ANSWER
        assert (len(one.bodies), len(two.bodies)) == (1, 2)
        two.gate.set()
        await asyncio.gather(*(call.done() for call in busy))


async def test_a_client_that_reconnects_joins_its_answer() -> None:
    replica = Script(stop_at=5)
    async with routers(replica, replica) as (first, _):
        call = send(first)
        await replica.stopped.wait()
        await call.chunks(1)
        await call.cancel()
        await first.until_idle()
        retry = send(first)
        await retry.chunks(1)
        replica.go_on.set()
        assert (await retry.done()).body == ANSWER
        assert (len(replica.bodies), replica.num_cancelled) == (1, 0)
        await first.until_idle()
        assert await replays(first) == {"joined": 1}


async def test_the_answer_ends_if_the_client_does_not_come_back() -> None:
    replica = Script(stop_at=5)
    async with routers(replica, idempotency={"disconnect_grace_s": 0.05}) as (first, _):
        call = send(first)
        await replica.stopped.wait()
        await call.cancel()
        await first.until(lambda: replica.num_cancelled == 1)


async def test_without_a_key_a_disconnect_ends_the_answer_at_once() -> None:
    replica = Script(stop_at=5)
    async with routers(replica) as (first, _):
        call = asgi.start(first.app, "POST", CHAT, BODY)
        await replica.stopped.wait()
        await call.cancel()
        await first.until(lambda: replica.num_cancelled == 1)


async def test_an_answer_survives_its_router_and_then_its_replica() -> None:
    one, two, three = Script(stop_at=3), Script(stop_at=9), Script()
    async with routers(one) as (first, second):
        call = send(first)
        await one.stopped.wait()
        await call.chunks(1)
        await lose(first, call)
        retry = send(second)
        await retry.chunks(1)
        await second.serve(two, "gen", "gen-2", resume_key="k")
        first_server = first.servers
        second.servers["gen-1"] = first_server.pop("gen-1")
        await second.kill("gen-1")
        await two.stopped.wait()
        assert two.earlier == [b"+++"]
        # The replica that continues the answer keeps it from its start.
        async with gateway_world(routing="least-load") as third:
            third.running["gen"] = {"gen-2": second.running["gen"]["gen-2"]}
            third.update("gen")
            await third.until(lambda: third.gateway.pools["gen"].replicas.num_ready == 1)
            joined = send(third)
            await joined.chunks(1)
            await third.serve(three, "gen", "gen-3", resume_key="k")
            two.go_on.set()
            assert (await retry.done()).body == ANSWER
            assert (await joined.done()).body == ANSWER
        assert len(two.bodies) == 1


async def test_a_joined_answer_keeps_its_id_at_another_replica() -> None:
    """Engines derive ids from the request's, and each attempt of a client has its own."""
    engines = [await start_engine(), await start_engine()]
    body = {"model": "gen", "stream": True, "max_tokens": 30, "messages": BODY["messages"]}
    async with routers() as (first, second):
        await add_replica(first, engines[0], "gen-1")
        share(first, second)
        await second.until(lambda: second.gateway.pools["gen"].replicas.num_ready == 1)
        call = send(first, body, **{"x-request-id": "r-1"})
        await call.chunks(3)
        await lose(first, call)
        retry = send(second, body, **{"x-request-id": "r-2"})
        await retry.chunks(3)
        await add_replica(second, engines[1], "gen-2")
        second.servers["gen-1"] = first.servers.pop("gen-1")
        await second.kill("gen-1")
        answer = await retry.done()
        assert {event["id"] for event in answer.data()} == {"chatcmpl-r-1"}
        assert sum(bool(event["choices"]) for event in answer.data()) > 30
        assert answer.headers["x-request-id"] == "r-2"
    for engine in engines:
        await engine.stop()


async def test_another_request_with_the_key_gets_422() -> None:
    async with routers(Script()) as (first, second):
        await send(first).done()
        for world in (first, second):
            answer = await send(world, BODY | {"temperature": 1}).done()
            assert answer.status == 422
            error = answer.json()["error"]
            assert error["type"] == "UnprocessableEntityError"
            assert "Idempotency-Key" in error["message"]
        await first.add("cls", "cls-1")
        other = await send(first, {"model": "cls"}, "/v1/embeddings").done()
        assert other.status == 422
        await first.until_idle()
        assert await replays(first) == {"rejected": 2}


@pytest.mark.parametrize("value", ["", "x" * 256, "schl\xfcssel"])
async def test_an_invalid_key_gets_400(value: str) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        scope_headers = {"idempotency-key": value}
        answer = await asgi.start(world.app, "POST", CHAT, BODY, scope_headers).done()
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "Idempotency-Key"


async def test_errors_of_the_engine_are_not_replayed() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        for _ in range(2):
            assert (await send(world, {"model": "gen", "fail": True}).done()).status == 500
        assert len(replica.bodies) == 2


async def test_a_large_body_and_a_plain_answer_are_repeated() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        body = {"model": "gen", "messages": "x" * 1_000_000, "prompt_tokens": 3}
        first = await send(world, body).done()
        second = await send(world, body).done()
        assert first.json() == second.json()
        assert len(replica.bodies) == 1


async def test_a_full_replica_still_gives_an_answer_that_it_has() -> None:
    async with gateway_world(max_queued=0) as world:
        replica = await world.add("gen", "gen-1")
        await send(world, {"model": "gen"}).done()
        busy = [
            asgi.start(world.app, "POST", CHAT, {"model": "gen", "wait_before": True})
            for _ in range(2)
        ]
        await world.until(lambda: len(replica.bodies) == 3)
        assert (await asgi.post(world.app, CHAT, {"model": "gen"})).status == 429
        assert (await send(world, {"model": "gen"}).done()).status == 200
        replica.gate.set()
        await asyncio.gather(*(call.done() for call in busy))


async def test_zero_turns_it_off() -> None:
    async with gateway_world(idempotency={"keep_s": 0}) as world:
        replica = await world.add("gen", "gen-1")
        for _ in range(2):
            assert REPLAYED not in (await send(world, {"model": "gen"}).done()).headers
        assert len(replica.bodies) == 2


async def test_tenants_do_not_share_keys() -> None:
    keys = AnswerKeys(IdempotencyConfig())

    async def read(tenant: str) -> AnswerKey:
        identity, headers = Identity(Tenant(tenant)), [(b"idempotency-key", b"1")]
        key = await keys.read(Request("r", "POST", CHAT, b"", headers, b"{}", identity))
        assert key is not None
        return key

    acme, again, other = [await read(tenant) for tenant in ("acme", "acme", "umbrella")]
    assert acme == again
    assert acme.id != other.id


# -- the client library -----------------------------------------------------------------------


@asynccontextmanager
async def jobs_transport(*worlds: World) -> AsyncIterator[tuple[Transport, list[LinkServer]]]:
    """Start the link servers of routers, and the transport of a Ray job that uses them."""
    servers = [
        LinkServer(GatewayApp(world.gateway, authenticates=False), SECRET) for world in worlds
    ]
    handle = FakeHandle(servers[-1].app, [await server.start() for server in servers])
    transport = Transport(handle)  # type: ignore[arg-type]
    try:
        yield transport, servers
    finally:
        await transport.close()
        for server in servers:
            await server.stop()


async def kill(server: LinkServer, world: World) -> None:
    """End a router's connections to jobs and replicas as its death does."""
    for connection in tuple(server.connections):
        connection.fail(LinkClosedError("killed"))
    closing = asyncio.ensure_future(server.stop())
    await world.gateway.close()
    await closing


async def stop(server: LinkServer, world: World) -> None:
    """Cut the answers of a router that stops, as an update does after ``router.max_answer_s``."""
    await server.stop()


@pytest.mark.parametrize("end", [kill, stop])
@pytest.mark.parametrize("stop_at", [1, 7, 13])
async def test_a_job_does_not_notice_the_death_of_a_router(
    stop_at: int, end: Callable[[LinkServer, World], Awaitable[None]]
) -> None:
    replica = Script(stop_at=stop_at)
    async with (
        routers(replica, replica) as (first, second),
        jobs_transport(first, second) as (transport, servers),
    ):
        opened = await transport.open("POST", CHAT, json.dumps(BODY).encode())
        read = asyncio.create_task(read_all(opened.answer))
        await replica.stopped.wait()
        (used,) = (n for n, server in enumerate(servers) if server.num_streams)
        await end(servers[used], (first, second)[used])
        await first.until(lambda: bool(servers[1 - used].num_streams))
        replica.go_on.set()
        assert await read == ANSWER
        assert len(replica.bodies) == 1


async def test_a_job_that_cancels_ends_the_answer_at_once() -> None:
    replica = Script(stop_at=3)
    # Without the cancellation, the answer would go on for this time, as clients may come back.
    grace = {"disconnect_grace_s": 600}
    async with (
        routers(replica, replica, idempotency=grace) as (first, second),
        jobs_transport(first, second) as (transport, _),
    ):
        opened = await transport.open("POST", CHAT, json.dumps(BODY).encode())
        await opened.answer.read()
        opened.answer.cancel()
        await first.until(lambda: replica.num_cancelled == 1)


async def test_a_job_gets_an_error_if_the_repeated_answer_differs() -> None:
    replica, other = Script(stop_at=3), Script(stop_at=3, chunks=[b"data: x\n\n"] * 16)
    async with (
        routers(replica, idempotency={"keep_s": 0}) as (first, _),
        routers(other, idempotency={"keep_s": 0}) as (second, _),
        jobs_transport(first, second) as (transport, servers),
    ):
        opened = await transport.open("POST", CHAT, json.dumps(BODY).encode())
        await opened.answer.read()
        (used,) = (n for n, server in enumerate(servers) if server.num_streams)
        await kill(servers[used], (first, second)[used])
        replica.go_on.set()
        other.go_on.set()
        with pytest.raises(UnavailableError, match="another answer"):
            await read_all(opened.answer)
