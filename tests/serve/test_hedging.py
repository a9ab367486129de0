"""A classification that takes long is tried at a second replica; the first answer is the answer."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.gateway.pools.hedging import HedgedRequest
from cluster.gateway.pools.relayed_body import RelayedBody
from tests import asgi
from tests.serve.gateway_kit import Replica, World, gateway_world, metrics

PATH = "/v1/embeddings"
DELAY_S = 0.05
HEDGED = "tandem_hedged_requests_total"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "cls", "input": "a text", "prompt_tokens": 5, **fields}


@asynccontextmanager
async def a_pool(num: int, **router: Any) -> AsyncIterator[tuple[World, list[Replica]]]:
    async with gateway_world(**router) as world:
        replicas = [await world.add("cls", f"cls-{number}") for number in range(num)]
        await asgi.post(world.app, PATH, body())
        yield world, replicas


def teach(world: World, requests: int = 1000) -> None:
    """Let the pool have had requests of ``DELAY_S``."""
    hedger = world.gateway.pools["cls"].hedger
    for _ in range(requests):
        hedger.add_request(1000.0)
        for tokens in range(1, 200):
            hedger.observe(tokens, DELAY_S)


async def begin(world: World, replicas: list[Replica]) -> tuple[asgi.Call, Replica, Replica]:
    """Begin a request that waits at its replicas; return it, its first replica and the other."""
    before = [len(replica.bodies) for replica in replicas]
    began_s = time.monotonic()
    call = asgi.start(world.app, "POST", PATH, body(wait_before=True))
    await world.until(lambda: [len(each.bodies) for each in replicas] != before)
    # By now, both may have it.
    arrived_s = {i: each.arrived_s[-1] for i, each in enumerate(replicas) if each.arrived_s}
    first = min((i for i in arrived_s if arrived_s[i] >= began_s), key=arrived_s.__getitem__)
    return call, replicas[first], replicas[1 - first]


async def begin_both(world: World, replicas: list[Replica]) -> tuple[asgi.Call, Replica, Replica]:
    """Begin a request as ``begin`` does, and wait until the other replica has it, too."""
    total = sum(len(each.bodies) for each in replicas) + 2
    begun = await begin(world, replicas)
    await world.until(lambda: sum(len(each.bodies) for each in replicas) == total)
    return begun


async def test_the_second_replica_answers_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tandem.requests")
    async with a_pool(2) as (world, replicas):
        teach(world)
        before = await metrics(world)
        call, first, second = await begin_both(world, replicas)
        second.gate.set()
        answer = await call.done()
        assert (answer.status, answer.json()["replica"]) == (200, second.name)
        await world.until(lambda: first.cancelled == 1)
        await world.until_idle()
        counts = await metrics(world)
        assert (counts[HEDGED, "cls", "won"], counts[HEDGED, "cls", "lost"]) == (1, 0)
        for name, labels, added in [
            ("tandem_requests_total", (PATH, "200"), 1),
            ("tandem_prompt_tokens_total", (), 5),
            ("tandem_arrivals_total", (), 1),
        ]:
            assert counts[name, "cls", *labels] - before[name, "cls", *labels] == added
    (line,) = (json.loads(r.message) for r in caplog.records if "hedge" in r.message)
    assert (line["hedge"], line["replica"], line["status"]) == ("won", second.name, 200)


async def test_the_first_replica_answers_after_all() -> None:
    async with a_pool(2) as (world, replicas):
        teach(world)
        call, first, second = await begin_both(world, replicas)
        first.gate.set()
        assert (await call.done()).json()["replica"] == first.name
        await world.until(lambda: second.cancelled == 1)
        await world.until_idle()
        counts = await metrics(world)
        assert (counts[HEDGED, "cls", "won"], counts[HEDGED, "cls", "lost"]) == (0, 1)


async def test_a_lost_first_replica_leaves_the_answer_to_the_second() -> None:
    async with a_pool(2) as (world, replicas):
        teach(world)
        call, first, second = await begin_both(world, replicas)
        await world.kill(first.name)
        second.gate.set()
        assert (await call.done()).json()["replica"] == second.name
        await world.until_idle()
        assert (await metrics(world))["tandem_failovers_total", "cls", "lost"] == 0


async def test_a_client_that_disconnects_ends_both_tries() -> None:
    async with a_pool(2) as (world, replicas):
        teach(world)
        call, _, _ = await begin_both(world, replicas)
        await call.cancel()
        await world.until(lambda: all(each.cancelled == 1 for each in replicas))
        await world.until_idle()
        counts = await metrics(world)
        assert counts["tandem_requests_total", "cls", PATH, "499"] == 1
        capacity = world.gateway.pools["cls"].queue.capacity
        assert (capacity.in_flight, capacity.in_flight_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("num", "requests", "router", "headers"),
    [
        (1, 1000, {}, {}),
        (2, 10, {}, {}),
        (2, 1000, {"hedge": {"enabled": False}}, {}),
        (2, 1000, {}, {"idempotency-key": "k" * 20}),
    ],
    ids=["one replica", "no budget", "off", "idempotency key"],
)
async def test_no_second_try(
    num: int, requests: int, router: dict[str, Any], headers: dict[str, str]
) -> None:
    async with a_pool(num, **router) as (world, replicas):
        teach(world, requests)
        total = sum(len(each.bodies) for each in replicas) + 1
        call = asgi.start(world.app, "POST", PATH, body(wait_before=True), headers=headers)
        await world.until(lambda: sum(len(each.bodies) for each in replicas) == total)
        await asyncio.sleep(4 * DELAY_S)
        for replica in replicas:
            replica.gate.set()
        assert (await call.done()).status == 200
        assert sum(len(each.bodies) for each in replicas) == total
        assert (await metrics(world))[HEDGED, "cls", "won"] == 0


async def test_a_client_that_disconnects_as_the_second_try_wins_ends_the_request_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    win = HedgedRequest.win

    def win_and_cancel(race: HedgedRequest, runner: RelayedBody) -> bool:
        has_won = win(race, runner)
        call.task.cancel()
        return has_won

    async with a_pool(2) as (world, replicas):
        teach(world)
        call, _, second = await begin_both(world, replicas)
        before = await metrics(world)
        monkeypatch.setattr(HedgedRequest, "win", win_and_cancel)
        second.gate.set()
        await asyncio.wait([call.task])
        await world.until_idle()
        counts = await metrics(world)
        ended = [key for key in counts if key[:2] == ("tandem_requests_total", "cls")]
        assert sum(counts[key] - before.get(key, 0) for key in ended) == 1
        capacity = world.gateway.pools["cls"].queue.capacity
        assert (capacity.in_flight, capacity.in_flight_tokens) == (0, 0)


async def test_no_second_try_at_a_replica_that_is_out() -> None:
    async with a_pool(2) as (world, replicas):
        teach(world)
        guard = world.gateway.pools["cls"].replicas.guard
        for _ in range(5):
            guard.fail_link("cls-1")
        assert guard.circuit("cls-1").is_out
        before = len(replicas[1].bodies)
        call, first, _ = await begin(world, replicas)
        await asyncio.sleep(4 * DELAY_S)
        first.gate.set()
        assert (await call.done()).json()["replica"] == "cls-0"
        assert len(replicas[1].bodies) == before


async def test_generators_are_not_hedged() -> None:
    async with gateway_world() as world:
        assert not world.gateway.pools["gen"].hedger.is_enabled
        assert world.gateway.pools["cls"].hedger.is_enabled
