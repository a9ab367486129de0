"""Relay, queue and failover of the gateway over real links."""

import asyncio
from contextlib import suppress

import pytest

from cluster.gateway import ReplicaInfo
from tests import asgi
from tests.serve.gateway_kit import (
    CHAT,
    ROUTES,
    World,
    gateway_world,
    metrics,
)


async def failovers(world: World) -> dict[str, float]:
    """Return the number of failovers by reason, without zeros."""
    found = await metrics(world)
    return {k[2]: n for k, n in found.items() if k[0] == "tandem_failovers_total" and n}


async def test_session_stays_at_one_replica() -> None:
    async with gateway_world(routing="session") as world:
        names = [f"gen-{number}" for number in range(4)]
        for name in names:
            await world.add("gen", name)

        async def replica_of(user: str | None = None, **headers: str) -> str:
            body = {"model": "gen", "messages": [{"role": "user", "content": "Hi"}], "user": user}
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await asgi.post(world.app, CHAT, body, headers=sent)
            return str(answer.json()["replica"])

        sessions = [str(number) for number in range(24)]
        homes = {each: await replica_of(x_session_id=each) for each in sessions}
        assert set(homes.values()) == set(names)
        for each in sessions:
            assert await replica_of(user=each) == homes[each]
            assert await replica_of(user="0", x_session_id=each) == homes[each]
        world.remove("gen", "gen-0")
        for each in sessions:
            now = await replica_of(x_session_id=each)
            assert now != "gen-0" if homes[each] == "gen-0" else now == homes[each]


async def test_request_and_response_are_relayed_unchanged() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        answer = await asgi.post(
            world.app,
            CHAT,
            {"model": "gen"},
            headers={
                "x-request-id": "abc",
                "authorization": "Bearer k",
                "x-extra": "1",
                "anthropic-version": "2023-06-01",
            },
        )
        assert answer.status == 200
        assert answer.json() == {"replica": "gen-1", "path": CHAT, "size": 16}
        assert answer.headers["x-request-id"] == "abc"
        assert answer.headers["x-engine"] == "gen-1"
        sent = dict(replica.seen[0]["headers"])
        assert sent[b"x-request-id"] == b"abc"
        assert sent[b"anthropic-version"] == b"2023-06-01"
        assert b"x-extra" not in sent
        assert b"authorization" not in sent


async def test_stream_arrives_complete_and_in_order() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.post(world.app, CHAT, {"stream": 5000})
        assert [int(data) for _, data in answer.events()] == list(range(5000))
        assert answer.headers["content-type"] == "text/event-stream"


async def test_disconnect_cancels_the_work_and_releases_the_slot() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"stream": 3, "wait_after": True})
        await call.chunks(1)
        await call.cancel()
        await world.until(lambda: replica.cancelled == 1)
        assert world.gateway.pools["gen"].replicas.running[0].in_flight == 0


async def test_requests_beyond_capacity_queue_up_to_the_limit() -> None:
    async with gateway_world(max_queued=2) as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(4)]
        await world.until(lambda: pool.num_queued == 2)
        refused = await asgi.post(world.app, CHAT, {})
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        replica.gate.set()
        assert [(await call.done()).status for call in calls] == [200] * 4
        assert len(replica.seen) == 4


async def test_disconnect_in_the_queue_takes_no_slot() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        pool = world.gateway.pools["gen"]
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(3)]
        await world.until(lambda: pool.num_queued == 1)
        await calls[2].cancel()
        assert pool.num_queued == 0
        replica.gate.set()
        for call in calls[:2]:
            await call.done()
        assert (await asgi.post(world.app, CHAT, {})).status == 200
        assert pool.replicas.running[0].in_flight == 0


async def test_request_waits_for_the_first_replica_until_the_timeout() -> None:
    async with gateway_world(queue_timeout_s=0.2) as world:
        answer = await asgi.post(world.app, CHAT, {"model": "gen"})
        assert answer.status == 503
        assert "no replica" in answer.json()["error"]["message"]
    async with gateway_world() as world:
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        await world.add("gen", "gen-1")
        assert (await call.done()).status == 200


async def test_pool_scaled_to_zero_is_ready_and_queues_requests() -> None:
    async with gateway_world(
        scales_to_zero=True, queue_timeout_s=0.05, start_timeout_s=30
    ) as world:
        await world.add("cls", "cls-1")
        assert (await asgi.get(world.app, "/ready")).status == 200
        assert (await asgi.get(world.app, "/v1/models")).status == 200
        assert (await asgi.get(world.app, "/openapi.json")).status == 200
        assert world.gateway.pools["gen"].meter.arrivals.value == 0  # these did not start a replica
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await asyncio.sleep(0.1)  # longer than queue_timeout_s, which applies with replicas
        assert world.gateway.load_report(0.0, 0.0)["gen/queued"] == 1
        await world.add("gen", "gen-1")
        assert (await call.done()).status == 200


@pytest.mark.parametrize("how", ["lost", "unavailable"])
async def test_request_fails_over_before_the_response_begins(how: str) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: world.servers["gen-1"].num_streams == 1)
        other = await world.add("gen", "gen-2")
        other.gate.set()
        if how == "lost":
            await world.gateway.pools["gen"].replicas.running[0].link.close()
        else:
            await world.servers["gen-1"].stop()
        answer = await call.done()
        assert answer.status == 200
        assert answer.json()["replica"] == "gen-2"
        assert await failovers(world) == {how: 1}


async def test_retried_request_goes_first_and_is_not_rejected_for_its_age() -> None:
    async with gateway_world(queue_timeout_s=2) as world:
        await world.add("gen", "gen-1")
        old = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: world.servers["gen-1"].num_streams == 1)
        await asyncio.sleep(2.1)  # longer than a request may wait in the queue
        other = await world.add("gen", "gen-2")
        running = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(3)]
        pool = world.gateway.pools["gen"]
        await world.until(lambda: pool.num_in_flight == 4)
        queued = asgi.start(world.app, "POST", CHAT, {"queued": True})
        await world.until(lambda: pool.num_queued == 1)
        world.remove("gen", "gen-1")
        await world.servers["gen-1"].stop()
        await world.until(lambda: pool.num_queued >= 2)
        other.gate.set()
        for call in (old, *running, queued):
            assert (await call.done()).status == 200
        ids = [dict(scope["headers"])[b"x-request-id"].decode() for scope in other.seen]
        assert ids.index(old.answer.headers["x-request-id"]) < ids.index(
            queued.answer.headers["x-request-id"]
        )


async def test_cut_off_stream_ends_with_an_error_event() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"stream": 2, "wait_after": True})
        await call.chunks(1)
        await world.servers["gen-1"].stop()
        answer = await call.done()
        assert answer.data()[-1]["error"]["code"] == 503
        capacity = world.gateway.pools["gen"].queue.capacity
        assert capacity.average_request_s(100.0) == 0  # nothing is learned from it


async def test_removed_replica_finishes_its_requests() -> None:
    async with gateway_world() as world:
        old = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(old.seen) == 1)
        world.remove("gen", "gen-1")
        new = await world.add("gen", "gen-2")
        assert (await asgi.post(world.app, CHAT, {})).json()["replica"] == "gen-2"
        old.gate.set()
        assert (await call.done()).json()["replica"] == "gen-1"
        assert len(old.seen) == len(new.seen) == 1
        assert await failovers(world) == {"drained": 1}


async def test_retiring_replica_finishes_its_requests_and_refuses_new_ones() -> None:
    async with gateway_world() as world:
        old = await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"wait_before": True})
        await world.until(lambda: len(old.seen) == 1)
        late = asgi.start(world.app, "POST", CHAT, {})
        while world.gateway.pools["gen"].num_in_flight < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        world.servers["gen-1"].retire()  # before it reads the second request
        await world.add("gen", "gen-2", ready=1)
        old.gate.set()
        assert (await call.done()).json()["replica"] == "gen-1"
        assert (await late.done()).json()["replica"] == "gen-2"
        assert await failovers(world) == {"refused": 1, "drained": 1}


async def test_load_is_balanced() -> None:
    async with gateway_world() as world:
        first = await world.add("gen", "gen-1")
        second = await world.add("gen", "gen-2")
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(4)]
        await world.until(lambda: len(first.seen) + len(second.seen) == 4)
        assert (len(first.seen), len(second.seen)) == (2, 2)
        first.gate.set()
        second.gate.set()
        for call in calls:
            await call.done()


async def test_close_leaves_no_task() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        await asgi.post(world.app, CHAT, {"stream": 10})
    with suppress(TimeoutError):
        await World.until(lambda: len(asyncio.all_tasks()) == 1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_slot_released_by_another_router_wakes_the_queue() -> None:
    """The load report of a replica that two routers share must wake the queue."""
    async with (
        gateway_world(queue_timeout_s=20) as world,
        gateway_world(queue_timeout_s=20) as other,
    ):
        replica = await world.add("gen", "gen-1")
        other.running["gen"] = world.running["gen"]
        other.update("gen")
        await other.until(lambda: other.gateway.pools["gen"].replicas.num_ready == 1)
        calls = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 2)
        await other.until(lambda: other.gateway.pools["gen"].replicas.fleet.in_flight("gen-1") == 2)
        waiting = asgi.start(other.app, "POST", CHAT, {})
        await other.until(lambda: other.gateway.pools["gen"].num_queued == 1)
        replica.gate.set()
        for call in [*calls, waiting]:
            assert (await call.done()).status == 200


async def test_disconnected_clients_leave_the_queue() -> None:
    async with gateway_world(max_queued=4) as world:
        for _ in range(20):
            call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
            await asyncio.sleep(0)
            await call.cancel()
        assert world.gateway.pools["gen"].num_queued == 0


async def test_close_ends_queued_and_running_requests() -> None:
    async with gateway_world() as world:
        replica = await world.add("gen", "gen-1")
        running = [asgi.start(world.app, "POST", CHAT, {"wait_before": True}) for _ in range(2)]
        await world.until(lambda: len(replica.seen) == 2)
        waiting = asgi.start(world.app, "POST", CHAT, {})
        await world.until(lambda: world.gateway.pools["gen"].num_queued == 1)
        await world.gateway.close()
        for call in [*running, waiting]:
            assert (await call.done()).status == 503


async def test_fallback_is_used_without_a_link() -> None:
    async with gateway_world(queue_timeout_s=5) as world:
        world.running["gen"]["gen-1"] = ReplicaInfo("gen-1", "127.0.0.1", 1, ROUTES)
        world.update("gen")
        answer = await asgi.post(world.app, CHAT, {})
        assert (answer.status, answer.body) == (200, b"gen-1")
        assert (await metrics(world))["tandem_link_fallbacks_total", "gen"] == 1
        await (
            world.gateway.pools["gen"].replicas.running[0].link.close()
        )  # nothing listens on its port
        del world.running["gen"]["gen-1"]
        await world.add("gen", "gen-2")
        answer = await asgi.post(world.app, CHAT, {})
        assert answer.json()["replica"] == "gen-2"
        assert (await metrics(world))["tandem_link_fallbacks_total", "gen"] == 1
