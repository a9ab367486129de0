"""The queue and the capacity under overload, with an engine and a load in virtual time."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.overload.virtual_time import VirtualLoop
from cluster.admission import Identity, PoolCapacity, QueueLimits, Tenant
from cluster.errors import OverloadedError
from cluster.gateway.pools.claim import Claim
from cluster.gateway.pools.queue import AdmissionQueue, SlotSource
from cluster.gateway.recording.observer import Observers, PoolMeter
from cluster.gateway.recording.request_log import RequestLog
from cluster.load import Load
from cluster.metrics import Registry

AT_A_TIME, SERVICE_S, DEADLINE_S = 16, 0.5, 3.0
CAPACITY = AT_A_TIME / SERVICE_S


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


@dataclass
class Engine:
    """Serves so many at a time, first come, first served; tells its load every 50 ms."""

    waiting: AdmissionQueue[Claim] = field(init=False)
    at_a_time: int = AT_A_TIME
    running: int = 0
    held: int = 0
    _queue: deque[asyncio.Future[None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.waiting = AdmissionQueue(
            "pool",
            QueueLimits(2e6, 1024),
            PoolCapacity(0.25),
            SlotSource(self._take, lambda _: None, lambda: True),
            PoolMeter("pool", Observers(Registry(), RequestLog(0.0))),
        )

    def _take(self, claim: Claim) -> Claim | None:
        if self.held >= 256:
            return None
        self.held += 1
        return claim

    async def ask(self, claim: Claim, work: float) -> None:
        place = await self.waiting.place(claim)
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self.running == self.at_a_time:
            turn: asyncio.Future[None] = loop.create_future()
            self._queue.append(turn)
            await turn
        else:
            self.running += 1
        await asyncio.sleep(SERVICE_S * work / 100)
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self.running -= 1
        self.held -= 1
        self.waiting.leave(place, work, loop.time() - began)
        self.waiting.dispatch()

    async def report(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.waiting.observe([Load(self.running, len(self._queue))])
            self.waiting.dispatch()


@dataclass
class Found:
    good: Counter[str] = field(default_factory=Counter)
    late: int = 0
    refused_s: list[float] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Traffic:
    tenant: Tenant
    times: float
    """The capacity."""
    work: float = 100.0


async def drive(engine: Engine, loads: list[Traffic], seconds: float = 40.0) -> Found:
    """Offer the loads for a while, the first 5 s not counted."""
    found, draw, loop = Found(), random.Random(7), asyncio.get_running_loop()
    began = loop.time()

    async def one(load: Traffic, counted: bool) -> None:
        now = loop.time()
        deadline = now + DEADLINE_S
        # What is expected of each is what they take on average, not what this one takes.
        claim = Claim(Identity(load.tenant), 100.0, 0, 0, deadline, deadline)
        try:
            await engine.ask(claim, load.work * draw.uniform(0.5, 1.5))
        except OverloadedError:
            if counted:
                found.refused_s.append(loop.time() - now)
            return
        if counted and loop.time() <= deadline:
            found.good[load.tenant.name] += 1
        elif counted:
            found.late += 1

    async def of(load: Traffic, group: asyncio.TaskGroup) -> None:
        while (now := loop.time() - began) < seconds:
            counted = now >= 5.0
            found.asked[load.tenant.name] += counted
            group.create_task(one(load, counted))
            await asyncio.sleep(draw.expovariate(load.times * CAPACITY))

    reporting = asyncio.ensure_future(engine.report())
    async with asyncio.TaskGroup() as group:
        for load in loads:
            group.create_task(of(load, group))
    reporting.cancel()
    return found


@pytest.mark.parametrize("times", [2.0, 5.0])
def test_goodput_stays_at_its_peak(times: float) -> None:
    async def scenario() -> None:
        found = await drive(Engine(), [Traffic(Tenant("flood"), times)])
        assert found.good["flood"] / 35 >= 0.95 * CAPACITY
        at_once = sum(seconds <= 0.05 for seconds in found.refused_s)
        assert at_once >= 0.99 * len(found.refused_s)
        assert found.late <= 0.02 * found.good["flood"]

    run(scenario)


def test_a_small_tenant_beside_a_flood_gets_what_it_asks_for() -> None:
    async def scenario() -> None:
        found = await drive(
            Engine(), [Traffic(Tenant("flood"), 5.0), Traffic(Tenant("small"), 0.25)]
        )
        assert found.good["small"] >= 0.9 * found.asked["small"]
        assert found.good.total() / 35 >= 0.95 * CAPACITY

    run(scenario)


@pytest.mark.parametrize("work", [100.0, 200.0])
def test_floods_share_by_weight_of_work_also_where_it_is_underestimated(work: float) -> None:
    async def scenario() -> None:
        loads = [Traffic(Tenant("light", 1.0), 3.0), Traffic(Tenant("heavy", 3.0), 3.0, work)]
        found = await drive(Engine(), loads, seconds=65.0)
        done = {"light": found.good["light"] * 100, "heavy": found.good["heavy"] * work}
        assert done["heavy"] / sum(done.values()) == pytest.approx(0.75, rel=0.1)

    run(scenario)


@pytest.mark.parametrize("num_behind", [0, 1])
def test_who_has_become_too_late_is_not_served_before_others(num_behind: int) -> None:
    async def scenario() -> None:
        engine, loop = Engine(), asyncio.get_running_loop()
        engine.held = 256  # nobody has room, so that all wait
        capacity = engine.waiting.capacity
        for seconds in (*([0.2] * 3), *([1.0] * 50)):  # at best 0.2 s, usually 1
            capacity.add_request(100.0)
            capacity.remove_request(100.0, 100.0, seconds)
            capacity.observe_loads([Load(1)], loop.time())
            await asyncio.sleep(0.5)

        def claim(timeout_s: float) -> Claim:
            until_s = loop.time() + timeout_s
            return Claim(Identity(Tenant("t")), 100.0, 0, 0, until_s, until_s)

        timeouts = (1.5, *([9.0] * num_behind))
        calls = [asyncio.ensure_future(engine.waiting.place(claim(t))) for t in timeouts]
        await asyncio.sleep(1.0)  # the first has 0.5 s left: enough only at best
        engine.held = 0
        engine.waiting.dispatch()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(ends[0], OverloadedError) == bool(num_behind)
        assert isinstance(ends[-1], Claim)

    run(scenario)


def test_a_pool_that_stalled_recovers() -> None:
    async def scenario() -> None:
        engine = Engine(at_a_time=1)  # as if the others hung
        await drive(engine, [Traffic(Tenant("flood"), 5.0)], seconds=20.0)
        engine.at_a_time = AT_A_TIME
        engine.running = 0
        found = await drive(engine, [Traffic(Tenant("flood"), 5.0)])
        assert found.good["flood"] / 35 >= 0.9 * CAPACITY

    run(scenario)


def test_a_few_waits_that_turn_out_otherwise_change_guesses_little() -> None:
    waiting = Engine().waiting
    for _ in range(1000):
        waiting._learn("t", 1.0, 1.0)
    for _ in range(100):
        waiting._learn("t", 1.0, 2.0)
    waited_s, guessed_s = waiting._waits["t"]
    assert 1.2 < waited_s / guessed_s < 1.4  # a queue's worth of them, and as many go by in 2 s


def test_a_refusal_says_when_the_work_before_it_is_done() -> None:
    async def scenario() -> None:
        engine, loop = Engine(), asyncio.get_running_loop()
        engine.held = 256  # nobody has room, so that all wait
        capacity = engine.waiting.capacity
        for _ in range(20):
            capacity.add_request(100.0)
        for _ in range(10):  # ten are left, of 100 tokens, each takes a second: 1000 a second
            capacity.remove_request(100.0, 100.0, 1.0)

        def claim(timeout_s: float) -> Claim:
            until_s = loop.time() + timeout_s
            return Claim(Identity(Tenant("t")), 100.0, 0, 0, until_s, until_s)

        calls = [asyncio.ensure_future(engine.waiting.place(claim(900.0))) for _ in range(80)]
        await asyncio.sleep(0)
        began_s = loop.time()
        with pytest.raises(OverloadedError) as refused:
            await engine.waiting.place(claim(5.0))
        assert loop.time() == began_s
        assert refused.value.retry_after_s == pytest.approx(8.0)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    run(scenario)
