"""Replicas that fail, and those on draining nodes, get no requests while others can answer."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.asgi import Receive, Scope, Send, usage_of
from cluster.routing import breaker
from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics
from tests.serve.test_handover import ANSWER, BODY, Script, start, world_with

PAUSE_S = 0.1


class Engine:
    """Application that answers with its name, or fails with status 500."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_broken = False
        self.poison = b"\0"
        """Requests with this text fail."""
        self.num_seen = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        self.num_seen += 1
        if b"no usage" not in body:
            usage_of(scope).prompt_tokens = 1
        status = 500 if self.is_broken or self.poison in body else 200
        status = 501 if b"unsupported" in body else status
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        content = {"replica": self.name, "error": {"message": "broken"}}
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})


@asynccontextmanager
async def a_pool(num: int, **router: Any) -> AsyncIterator[tuple[World, list[Engine]]]:
    engines = [Engine(f"gen-{number}") for number in range(num)]
    async with gateway_world(routing="round-robin", **router) as world:
        for engine in engines:
            await world.serve(engine, "gen", engine.name)
        yield world, engines


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "PAUSE_S", PAUSE_S)
    # The more time the requests take, the more trials fail, so the pauses must not double.
    monkeypatch.setattr(breaker, "MAX_PAUSE_S", PAUSE_S)
    monkeypatch.setattr(breaker, "TRIAL_INTERVAL_S", 0.0)


async def ask(world: World, num: int, text: str = "") -> Counter[int]:
    """Send different requests, one after the other; return their statuses."""
    statuses: Counter[int] = Counter()
    for number in range(num):
        prompt = {"model": "gen", "messages": [{"role": "user", "content": f"{number} {text}"}]}
        statuses[(await asgi.post(world.app, CHAT, prompt)).status] += 1
    return statuses


async def circuit(world: World, state: str) -> float:
    return (await metrics(world))["tandem_circuits", "gen", state]


async def test_a_failing_replica_is_taken_out_and_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tandem.requests")
    async with a_pool(2, log_requests_per_s=1000) as (world, (bad, _)):
        assert await ask(world, 20) == {200: 20}
        bad.is_broken = True
        statuses = await ask(world, 40)
        assert statuses[500] <= 10
        assert await ask(world, 20, "later") == {200: 20}
        counts = await metrics(world)
        assert counts["tandem_circuit_openings_total", "failing", "gen"] >= 1
        assert counts["tandem_circuits", "gen", "closed"] == 1
        # Each trial fails, and the other replica answers it.
        seen = bad.num_seen
        for _ in range(2):
            await asyncio.sleep(4 * PAUSE_S)
            assert await ask(world, 10, "trial") == {200: 10}
        assert bad.num_seen > seen
        bad.is_broken = False
        await asyncio.sleep(8 * PAUSE_S)
        assert await ask(world, 10, "good") == {200: 10}
        assert await circuit(world, "closed") == 2
        seen = bad.num_seen
        await ask(world, 10, "again")
        assert bad.num_seen == seen + 5
    logged = [each.message for each in caplog.records if each.name == "tandem.requests"]
    trials = [line for line in map(json.loads, logged) if line.get("trial")]
    assert len(trials) >= breaker.TRIALS


async def test_answers_without_usage_restore_no_replica() -> None:
    """The engine may not have worked for them."""
    async with a_pool(2) as (world, (bad, _)):
        bad.is_broken = True
        await ask(world, 40)
        bad.is_broken = False
        await asyncio.sleep(4 * PAUSE_S)
        assert await ask(world, 20, "no usage") == {200: 20}
        assert await circuit(world, "closed") == 1
        assert await ask(world, 20, "again") == {200: 20}
        assert await circuit(world, "closed") == 2


async def test_a_replica_that_fails_after_the_first_byte_is_taken_out() -> None:
    async with world_with(Script(stop_at=5, dies=True), Script(), key="") as world:
        for number in range(40):
            await asgi.post(world.app, CHAT, {**BODY, "seed": number})
        counts = await metrics(world)
        assert counts["tandem_circuit_openings_total", "failing", "gen"] >= 1


async def test_an_unsupported_request_is_no_bad_trial() -> None:
    async with a_pool(2) as (world, (bad, _)):
        bad.is_broken = True
        await ask(world, 40)
        await asyncio.sleep(4 * PAUSE_S)
        before = (await metrics(world))["tandem_circuit_openings_total", "failing", "gen"]
        assert await ask(world, 5, "unsupported") == {501: 5}
        counts = await metrics(world)
        assert counts["tandem_circuit_openings_total", "failing", "gen"] == before
        assert counts["tandem_circuits", "gen", "half_open"] == 1


async def test_requests_that_fail_everywhere_take_out_no_replica() -> None:
    async with a_pool(3) as (world, engines):
        for engine in engines:
            engine.poison = b"poison"
        for _ in range(20):
            assert await ask(world, 2, "poison") == {500: 2}
            assert await ask(world, 1) == {200: 1}
        assert await circuit(world, "closed") == 3


@pytest.mark.parametrize(("num", "share"), [(1, 0.5), (2, 0.4)])
async def test_the_last_replicas_are_not_taken_out(num: int, share: float) -> None:
    async with a_pool(num, circuit_breaker={"max_share": share}) as (world, engines):
        engines[0].is_broken = True
        assert (await ask(world, 40))[500] == 40 / num
        assert await circuit(world, "closed") == num


async def test_the_breakers_can_be_turned_off() -> None:
    async with a_pool(2, circuit_breaker={"enabled": False}) as (world, engines):
        engines[0].is_broken = True
        assert (await ask(world, 40))[500] == 20


async def test_a_replica_returns_if_it_is_the_last_one() -> None:
    async with a_pool(2) as (world, (bad, _)):
        bad.is_broken = True
        await ask(world, 40)
        bad.is_broken = False
        assert await circuit(world, "open") == 1
        world.remove("gen", "gen-1")
        assert await ask(world, 5, "last") == {200: 5}
        assert bad.num_seen >= 5


async def test_a_replica_that_is_out_goes_on_with_its_answers() -> None:
    first = Script(stop_at=5)
    async with world_with(first) as world:
        call = await start(world, first)
        await world.serve(Engine("gen-2"), "gen", "gen-2", resume_key="k")
        guard = world.gateway.pools["gen"].replicas.guard
        for _ in range(5):
            guard.fail_link("gen-1")
        assert guard.circuit("gen-1").is_out
        first.go_on.set()
        assert (await call.done()).body == ANSWER


async def test_answers_leave_a_draining_node_and_new_requests_go_elsewhere() -> None:
    first, second = Script(stop_at=5), Script()
    async with world_with() as world:
        replicas = world.gateway.pools["gen"].replicas
        await world.serve(first, "gen", "gen-1", resume_key="k", node_id="n1")
        call = await start(world, first)
        replicas.set_draining_nodes(frozenset({"n1"}))
        # There is no other replica, so it goes on with all requests.
        other = asgi.start(world.app, "POST", CHAT, {**BODY, "n": 2})
        await world.until(lambda: len(first.bodies) == 2)
        await world.serve(second, "gen", "gen-2", resume_key="k", node_id="n2")
        replicas.set_draining_nodes(frozenset({"n1"}))
        for each in (call, other):
            assert (await each.done()).body == ANSWER
        assert len(second.bodies) == 2
        counts = await metrics(world)
        assert counts["tandem_stream_handovers_total", "gen", "continued", "drained"] == 2
        assert counts["tandem_draining_replicas", "gen"] == 1
        assert (await asgi.post(world.app, CHAT, BODY)).body == ANSWER
        assert (len(first.bodies), len(second.bodies)) == (2, 3)
        replicas.set_draining_nodes(frozenset())
        assert (await metrics(world))["tandem_draining_replicas", "gen"] == 0
