"""The memory of a router does not depend on how many requests and replicas it has had."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import count

import pytest

from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world
from tests.serve.test_handover import ANSWER, BODY, Script

WARM_UP, MORE = 5, 20
HISTORY = {"PoolSecond", "ReplicaChange", "Second", "_Totals", "_Sample"}
"""Types of rings that are still filling: the dashboard's (300 seconds, 50 changes of replicas), and
the loads of the last seconds."""

Action = Callable[[], Awaitable[None]]


@pytest.fixture(autouse=True)
def _without_collections() -> Iterator[None]:
    """Disable the cyclic collector: memory that only it frees stays for minutes in a real router.

    A request lives through the collections of the two young generations. The old one is collected
    once it has grown by a quarter, which is tens of megabytes.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count_objects() -> Counter[str]:
    """Return the numbers of our own objects, and of what requests leave behind, by type."""
    found: Counter[str] = Counter()
    for each in gc.get_objects():
        kind = type(each)
        is_ours = str(kind.__module__).startswith("cluster.")
        if (is_ours and kind.__qualname__ not in HISTORY) or kind.__name__ in (
            *("Task", "Future", "coroutine", "async_generator", "frame", "traceback"),
        ):
            found[kind.__qualname__] += 1
    return found


async def growth(
    act: Action, settled: Callable[[], bool], *, collects: bool = False
) -> Counter[str]:
    """Return by how much the numbers of objects grow when ``act`` is repeated.

    Args:
        act: What is repeated.
        settled: True once nothing of it goes on.
        collects: True if the cyclic collector may run before counting.
    """
    counts = []
    for repetitions in (WARM_UP, MORE):
        for _ in range(repetitions):
            await act()
        await World.until(settled)
        await asyncio.sleep(0.05)  # for callbacks and closed transports
        if collects:
            gc.collect()
        counts.append(count_objects())
    deadline = time.monotonic() + 10
    while (grown := counts[1] - counts[0]) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)  # on a slow machine, these take longer
        counts[1] = count_objects()
    return grown


def is_idle(world: World) -> Callable[[], bool]:
    def check() -> bool:
        for pool in world.gateway.pools.values():  # no first token is expected any more
            pool.replicas.guard.advance(time.monotonic() + 60)
        return world.gateway.num_open_requests == 0

    return check


@pytest.mark.parametrize("kind", ["stream", "plain", "keyed", "disconnect", "queued", "unknown"])
async def test_requests_leave_nothing_for_the_garbage_collector(kind: str) -> None:
    keys = count()
    async with gateway_world(routing="prefix", idempotency={"keep_s": 0.1}) as world:
        replica = await world.add("gen", "gen-1")

        def start(**fields: object) -> asgi.Call:
            headers = {"idempotency-key": f"k{next(keys)}"} if kind == "keyed" else {}
            message = {"role": "user", "content": "x" * 50}
            body = {"model": "gen", "messages": [message], **fields}
            return asgi.start(world.app, "POST", CHAT, body, headers)

        async def act() -> None:
            if kind == "disconnect":
                call = start(stream=2, wait_after=True)
                await call.chunks(1)
                await call.cancel()
            elif kind == "queued":  # more than the replica's slots
                for call in [start(stream=3) for _ in range(5)]:
                    await call.done()
            elif kind == "unknown":
                assert (await start(model="none").done()).status == 404
            else:
                answer = await start(stream=0 if kind == "plain" else 5).done()
                assert answer.status == 200
            replica.seen.clear()  # holds the scope of each request
            replica.bodies.clear()

        def has_settled() -> bool:
            (linked,) = world.gateway.pools["gen"].replicas.running
            return is_idle(world)() and not linked.answer_ids and not linked.link.num_open

        assert not await growth(act, has_settled)


async def test_answers_that_move_leave_nothing() -> None:
    async with gateway_world(routing="least-load") as world:
        names = count()

        async def act() -> None:
            first, second = Script(stop_at=5), Script()
            old, new = f"gen-{next(names)}", f"gen-{next(names)}"
            await world.serve(first, "gen", old, resume_key="k")
            call = asgi.start(world.app, "POST", CHAT, BODY)
            await first.stopped.wait()
            await world.serve(second, "gen", new, resume_key="k")
            world.remove("gen", old)
            assert (await call.done()).body == ANSWER
            await world.until_idle()
            world.remove("gen", new)
            for name in (old, new):
                await world.servers.pop(name).stop()

        assert not await growth(act, is_idle(world), collects=True)


async def test_replicas_that_die_leave_nothing() -> None:
    async with gateway_world(routing="prefix") as world:
        names = count()

        async def act() -> None:
            name = f"gen-{next(names)}"
            await world.add("gen", name)
            calls = [asgi.start(world.app, "POST", CHAT, {**BODY, "stream": 3}) for _ in range(3)]
            for call in calls:
                await call.done()
            await world.kill(name)
            world.remove("gen", name)

        assert not await growth(act, is_idle(world), collects=True)
