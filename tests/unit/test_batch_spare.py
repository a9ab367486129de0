"""Slots for lines of batches beside other requests, with a scripted pool."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import RouterConfig
from cluster.gateway.batches.spare import QUIET_S, LineSlot, SpareCapacity
from cluster.metrics import Counter

CONFIG = RouterConfig().batches


class ScriptedPool:
    """A pool whose other requests and room are set by the test."""

    def __init__(self) -> None:
        self.meter = SimpleNamespace(num_interactive=0, num_interactive_arrivals=0)
        self.replicas = SimpleNamespace(num_ready=1)
        self.queue = SimpleNamespace(has_room=True)
        self.is_asleep = False

    def arrive(self, number: int) -> None:
        self.meter.num_interactive += number
        self.meter.num_interactive_arrivals += number


class Spare:
    def __init__(self) -> None:
        self.pool: Any = ScriptedPool()
        self.preemptions = Counter()
        self.elsewhere = 0
        self.capacity = SpareCapacity(self.pool, lambda: self.elsewhere, self.preemptions)
        self.now_s = 0.0
        self._takes: list[asyncio.Task[LineSlot]] = []

    def want(self, number: int, is_urgent: Callable[[], bool] = bool) -> None:
        for _ in range(number):
            take = asyncio.create_task(self.capacity.take(is_urgent))
            self._takes.append(take)

    async def adjust(self, after_s: float = 0.0) -> list[LineSlot]:
        """Return the slots that are granted and not stopped."""
        await asyncio.sleep(0)
        self.now_s += after_s
        self.capacity.adjust(CONFIG, self.now_s)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        granted = [take.result() for take in self._takes if take.done()]
        return [slot for slot in granted if not slot.is_stopped]

    def close(self) -> None:
        for take in self._takes:
            take.cancel()


@pytest.fixture
async def spare() -> Any:
    made = Spare()
    yield made
    made.close()


async def test_lines_start_slowly_while_the_pool_is_quiet(spare: Spare) -> None:
    spare.want(10)
    (first,) = await spare.adjust()
    assert len(await spare.adjust()) == 1
    spare.capacity.release(first, is_finished=True)
    assert len(await spare.adjust()) == 3  # the first, and two now


async def test_lines_stop_when_others_arrive_and_start_after_a_pause(spare: Spare) -> None:
    spare.want(5)
    (slot,) = await spare.adjust()
    spare.pool.arrive(1)
    assert await spare.adjust() == []
    assert spare.preemptions.value == 1
    spare.capacity.release(slot, is_finished=False)
    spare.pool.meter.num_interactive = 0
    assert await spare.adjust(QUIET_S / 2) == []
    assert len(await spare.adjust(QUIET_S)) == 1


async def test_many_requests_leave_room_for_their_share(spare: Spare) -> None:
    spare.pool.arrive(29)
    spare.want(5)
    assert len(await spare.adjust()) == 2
    assert spare.preemptions.value == 0


async def test_requests_at_other_routers_count(spare: Spare) -> None:
    spare.elsewhere = 300  # perhaps all of them in other pools
    spare.want(1)
    assert await spare.adjust(QUIET_S) == []


async def test_one_line_that_became_urgent_runs_beside_others(spare: Spare) -> None:
    spare.pool.arrive(1)
    late = False
    spare.want(2, lambda: late)
    assert await spare.adjust() == []
    late = True  # while the lines wait
    assert len(await spare.adjust()) == 1
    assert len(await spare.adjust()) == 1
    assert spare.preemptions.value == 0


async def test_lines_wait_for_room_and_wake_a_pool(spare: Spare) -> None:
    spare.want(3)
    spare.pool.queue.has_room = False
    assert await spare.adjust() == []
    spare.pool.queue.has_room = True
    spare.pool.replicas.num_ready = 0
    assert await spare.adjust() == []
    spare.pool.is_asleep = True
    assert len(await spare.adjust()) == 1
