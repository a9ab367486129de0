"""Slots for lines of batches beside other requests, with a scripted pool."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import RouterConfig
from cluster.gateway.batches.spare import PLACEMENT_S, QUIET_S, LineSlot, SpareCapacity
from cluster.metrics import Counter

CONFIG = RouterConfig().batches


class ScriptedQueue:
    """A queue with ``num_slots``; lines take them."""

    def __init__(self) -> None:
        self.num_slots = 100
        self.num_taken = 0

    @property
    def has_room(self) -> bool:
        return self.num_taken < self.num_slots

    def take(self, slot: LineSlot) -> None:
        self.num_taken += 1
        slot.place()


class ScriptedPool:
    """A pool whose other requests and room are set by the test."""

    def __init__(self) -> None:
        self.meter: Any = SimpleNamespace(num_interactive=0, num_interactive_arrivals=0)
        self.replicas = SimpleNamespace(num_ready=1)
        self.queue = ScriptedQueue()
        self.is_asleep = False

    def arrive(self, number: int) -> None:
        self.meter.num_interactive += number
        self.meter.num_interactive_arrivals += number
        self.meter.on_interactive()


class Spare:
    def __init__(self) -> None:
        self.pool: Any = ScriptedPool()
        self.preemptions = Counter()
        self.elsewhere = 0
        self.capacity = SpareCapacity(self.pool, lambda: self.elsewhere, self.preemptions)
        self.now_s = 0.0
        self.takes_slots = True
        """False if lines do not take their slots at once."""
        self._takes: list[asyncio.Task[LineSlot]] = []

    def want(self, number: int, is_urgent: Callable[[], bool] = bool) -> None:
        for _ in range(number):
            self._takes.append(asyncio.create_task(self._take(is_urgent)))

    async def _take(self, is_urgent: Callable[[], bool]) -> LineSlot:
        slot = await self.capacity.take(is_urgent)
        if self.takes_slots:
            self.pool.queue.take(slot)
        return slot

    async def adjust(self, after_s: float = 0.0) -> list[LineSlot]:
        """Return the slots that are granted and not stopped."""
        await asyncio.sleep(0)
        self.now_s += after_s
        self.capacity.adjust(CONFIG, self.now_s)
        return await self.settle()

    async def settle(self) -> list[LineSlot]:
        for _ in self._takes:  # each starts the next one
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
    assert slot.is_stopped  # before the next adjustment
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
    spare.pool.queue.num_slots = 0
    assert await spare.adjust() == []
    spare.pool.queue.num_slots = 1
    spare.pool.replicas.num_ready = 0
    assert await spare.adjust() == []
    spare.pool.is_asleep = True
    assert len(await spare.adjust()) == 1


async def test_one_free_slot_starts_one_line(spare: Spare) -> None:
    spare.pool.queue.num_slots = 1
    spare.pool.arrive(39)  # leave room for three lines
    spare.want(3)
    assert len(await spare.adjust()) == 1
    spare.pool.queue.num_slots = 2
    assert len(await spare.adjust()) == 2


async def test_a_line_starts_after_the_one_before_it_has_a_slot_or_has_ended(spare: Spare) -> None:
    spare.takes_slots = False
    spare.pool.queue.num_slots = 2
    spare.pool.arrive(39)
    spare.want(4)
    (first,) = await spare.adjust()
    assert await spare.adjust(PLACEMENT_S / 2) == [first]
    spare.capacity.release(first, is_finished=False)  # cancelled or refused
    _, second = await spare.adjust()
    spare.pool.queue.take(second)  # starts the next one at once
    assert len(await spare.settle()) == 3


async def test_a_line_without_a_slot_blocks_the_others_only_for_a_moment(spare: Spare) -> None:
    spare.takes_slots = False
    spare.pool.arrive(39)
    spare.want(3)
    assert len(await spare.adjust()) == 1
    assert len(await spare.adjust(PLACEMENT_S)) == 2
