"""Admission queue and capacity under overload, with a simulated engine in virtual time."""

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.overload.virtual_time import VirtualLoop
from cluster.admission import (
    RECENT_S,
    Identity,
    PoolCapacity,
    QueueLimits,
    Tenant,
    WaitCorrection,
)
from cluster.errors import OverloadedError
from cluster.gateway.pools.queue import AdmissionQueue
from cluster.gateway.pools.slots import Claim, EngineSlots, Slot
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.gateway.recording.request_log import RequestLog
from cluster.load import Load
from cluster.metrics import Registry
from cluster.usage import Usage

MAX_RUNNING, SERVICE_S, DEADLINE_S = 16, 0.5, 3.0
MAX_IN_FLIGHT = 256
CAPACITY = MAX_RUNNING / SERVICE_S  # requests per second
REQUEST_TOKENS = 100.0
WARM_UP_S = 5.0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


@dataclass
class Engine:
    """Slot source of one engine that serves first come, first served, and reports every 50 ms."""

    queue: AdmissionQueue = field(init=False)
    max_running: int = MAX_RUNNING
    num_ready: int = 1
    running: int = 0
    in_flight: int = 0
    max_in_flight: int = MAX_IN_FLIGHT
    slots: int = 0
    """Slots that it reports; 0 if none."""
    num_elsewhere: int = 0
    """Requests of other routers."""
    waits_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Times from the arrival of each tenant's requests until the engine ran them."""
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        meter = PoolMeter("pool", RequestSinks(Registry(), RequestLog(0.0)))
        limits = QueueLimits(2e6, 1024)
        self.queue = AdmissionQueue("pool", limits, PoolCapacity(0.25), self, meter)

    @property
    def has_room(self) -> bool:
        return self.in_flight < self.max_in_flight

    def engine_slots(self) -> EngineSlots | None:
        free = self.slots - self.in_flight - self.num_elsewhere
        return EngineSlots(self.slots, free) if self.slots else None

    def take_slot(self, claim: Claim) -> Slot | None:
        if not self.has_room:
            return None
        self.in_flight += 1
        return Slot(None, None, claim, asyncio.get_running_loop().time())

    def take_slot_at(self, replica_id: str, claim: Claim) -> Slot | None:
        self.in_flight += 1
        return Slot(None, None, claim, asyncio.get_running_loop().time())

    def release_slot(self, slot: Slot, usage: Usage | None) -> float:
        self.in_flight -= 1
        return asyncio.get_running_loop().time() - slot.since_s

    async def serve(self, claim: Claim, work_tokens: float) -> None:
        arrived_s = asyncio.get_running_loop().time()
        slot = await self.queue.take_slot(claim)
        if self.running == self.max_running:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        else:
            self.running += 1
        waited_s = asyncio.get_running_loop().time() - arrived_s
        self.waits_s[claim.identity.tenant.name].append(waited_s)
        await asyncio.sleep(SERVICE_S * work_tokens / REQUEST_TOKENS)
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.running -= 1
        self.queue.release_slot(slot, work_tokens)

    async def report(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.queue.observe_loads([Load(self.running, len(self._waiting))])


@dataclass
class Result:
    """Requests by tenant, and how they ended, without those of the warm-up."""

    sent: Counter[str] = field(default_factory=Counter)
    in_time: Counter[str] = field(default_factory=Counter)
    num_late: int = 0
    refused_after_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Traffic:
    """Poisson arrivals of one tenant."""

    tenant: Tenant
    rate: float
    """Requests, in multiples of the engine's capacity."""
    mean_tokens: float = REQUEST_TOKENS


async def drive(engine: Engine, traffics: list[Traffic], seconds: float = 40.0) -> Result:
    result, draw, loop = Result(), random.Random(7), asyncio.get_running_loop()
    started_s = loop.time()

    async def send(traffic: Traffic, is_counted: bool) -> None:
        now_s = loop.time()
        deadline_s = now_s + DEADLINE_S
        # The estimate is the usual mean, not this request's actual work.
        claim = Claim(Identity(traffic.tenant), REQUEST_TOKENS, 0, 0, deadline_s, deadline_s)
        try:
            await engine.serve(claim, traffic.mean_tokens * draw.uniform(0.5, 1.5))
        except OverloadedError:
            if is_counted:
                result.refused_after_s.append(loop.time() - now_s)
            return
        if is_counted and loop.time() <= deadline_s:
            result.in_time[traffic.tenant.name] += 1
        elif is_counted:
            result.num_late += 1

    async def send_all(traffic: Traffic, group: asyncio.TaskGroup) -> None:
        while (elapsed_s := loop.time() - started_s) < seconds:
            is_counted = elapsed_s >= WARM_UP_S
            result.sent[traffic.tenant.name] += is_counted
            group.create_task(send(traffic, is_counted))
            await asyncio.sleep(draw.expovariate(traffic.rate * CAPACITY))

    reporting = asyncio.ensure_future(engine.report())
    async with asyncio.TaskGroup() as group:
        for traffic in traffics:
            group.create_task(send_all(traffic, group))
    reporting.cancel()
    return result


def goodput(result: Result, seconds: float = 40.0) -> float:
    """Requests per second that ended before their deadline."""
    return result.in_time.total() / (seconds - WARM_UP_S)


def claim_with_timeout(timeout_s: float) -> Claim:
    until_s = asyncio.get_running_loop().time() + timeout_s
    return Claim(Identity(Tenant("t")), REQUEST_TOKENS, 0, 0, until_s, until_s)


@pytest.mark.parametrize("rate", [2.0, 5.0])
def test_goodput_stays_at_capacity_under_overload(rate: float) -> None:
    async def scenario() -> None:
        result = await drive(Engine(), [Traffic(Tenant("flood"), rate)])
        assert goodput(result) >= 0.95 * CAPACITY
        at_once = sum(seconds <= 0.05 for seconds in result.refused_after_s)
        assert at_once >= 0.99 * len(result.refused_after_s)
        assert result.num_late <= 0.02 * result.in_time["flood"]

    run(scenario)


def test_small_tenant_is_served_next_to_a_flood() -> None:
    async def scenario() -> None:
        flood, small = Traffic(Tenant("flood"), 5.0), Traffic(Tenant("small"), 0.25)
        result = await drive(Engine(), [flood, small])
        assert result.in_time["small"] >= 0.9 * result.sent["small"]
        assert goodput(result) >= 0.95 * CAPACITY

    run(scenario)


def test_a_flood_leaves_free_slots_to_a_small_tenant() -> None:
    async def scenario() -> None:
        flood, small = Traffic(Tenant("flood"), 6.0), Traffic(Tenant("small"), 0.4)
        p98_s = []
        for slots in (0, 32):
            engine = Engine(max_running=32, slots=slots)
            result = await drive(engine, [flood, small])
            waits_s = sorted(engine.waits_s["small"])
            p98_s.append(waits_s[int(0.98 * len(waits_s))])
        assert p98_s[1] < 0.02 < 0.2 < p98_s[0]
        assert goodput(result) >= 0.9 * 2 * CAPACITY
        assert result.num_late <= 0.02 * result.in_time["flood"]

    run(scenario)


async def flood_beside(engine: Engine, num_queued: int) -> list[asyncio.Task[Slot]]:
    """Let another tenant have sent a request, and queue a flood's requests in a full pool."""
    await engine.queue.take_slot(claim_of("small", REQUEST_TOKENS))
    engine.max_in_flight = engine.in_flight
    take = engine.queue.take_slot
    flood = [
        asyncio.create_task(take(claim_of("flood", REQUEST_TOKENS))) for _ in range(num_queued)
    ]
    await asyncio.sleep(0)
    engine.max_in_flight = MAX_IN_FLIGHT
    return flood


def test_a_flood_uses_all_slots_soon_after_the_last_request_of_others() -> None:
    async def scenario() -> None:
        engine = Engine(slots=20)
        flood = await flood_beside(engine, 30)
        engine.queue.dispatch()
        await asyncio.sleep(0)
        assert sum(task.done() for task in flood) == 20 - 1 - 2  # two remain free
        await asyncio.sleep(RECENT_S + 0.1)  # without any event
        assert all(task.done() for task in flood)

    run(scenario)


def test_a_router_without_requests_may_always_send_one() -> None:
    async def scenario() -> None:
        engine = Engine(slots=20, num_elsewhere=25)
        slot = await engine.queue.take_slot(claim_of("small", REQUEST_TOKENS))
        engine.max_in_flight = 1
        take = engine.queue.take_slot
        flood = [asyncio.create_task(take(claim_of("flood", REQUEST_TOKENS))) for _ in range(10)]
        await asyncio.sleep(0)
        engine.max_in_flight = MAX_IN_FLIGHT
        engine.queue.release_slot(slot, REQUEST_TOKENS)
        await asyncio.sleep(0)
        assert sum(task.done() for task in flood) == 1
        for task in flood:
            task.cancel()

    run(scenario)


@pytest.mark.parametrize("heavy_tokens", [REQUEST_TOKENS, 2 * REQUEST_TOKENS])
def test_floods_share_by_weight_even_if_work_is_underestimated(heavy_tokens: float) -> None:
    async def scenario() -> None:
        light = Traffic(Tenant("light", 1.0), 3.0)
        heavy = Traffic(Tenant("heavy", 3.0), 3.0, heavy_tokens)
        result = await drive(Engine(), [light, heavy], seconds=65.0)
        light_work = result.in_time["light"] * REQUEST_TOKENS
        heavy_work = result.in_time["heavy"] * heavy_tokens
        assert heavy_work / (light_work + heavy_work) == pytest.approx(3 / 4, rel=0.1)

    run(scenario)


@pytest.mark.parametrize("num_behind", [0, 1])
def test_late_request_gives_way_only_if_another_one_waits(num_behind: int) -> None:
    async def scenario() -> None:
        engine = Engine(in_flight=MAX_IN_FLIGHT)  # full, so that all requests wait
        capacity = engine.queue.capacity
        for seconds in (*([0.2] * 3), *([1.0] * 50)):  # 0.2 s at best, 1 s on average
            capacity.add_request(REQUEST_TOKENS)
            capacity.remove_request(REQUEST_TOKENS, REQUEST_TOKENS, seconds)
            capacity.observe_loads([Load(1)], asyncio.get_running_loop().time())
            await asyncio.sleep(0.5)
        timeouts = (1.5, *([9.0] * num_behind))
        tasks = [
            asyncio.ensure_future(engine.queue.take_slot(claim_with_timeout(timeout)))
            for timeout in timeouts
        ]
        await asyncio.sleep(1.0)  # leaves the first 0.5 s: enough at best, not on average
        engine.in_flight = 0
        engine.queue.dispatch()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], OverloadedError) == bool(num_behind)
        assert isinstance(results[-1], Slot)

    run(scenario)


def claim_of(tenant: str, work_tokens: float, timeout_s: float = 60.0) -> Claim:
    expires_s = asyncio.get_running_loop().time() + timeout_s
    return Claim(Identity(Tenant(tenant)), work_tokens, expires_s=expires_s)


def test_large_request_does_not_block_the_queue_next_to_free_slots() -> None:
    async def scenario() -> None:
        engine = Engine(max_in_flight=4)
        engine.queue.capacity.limit_tokens = 4 * REQUEST_TOKENS
        slots = [await engine.queue.take_slot(claim_of("b", REQUEST_TOKENS))]
        # Once, it waited until 100,000 tokens had room, and all others behind it.
        slots.append(await engine.queue.take_slot(claim_of("a", 1e5)))
        others = [
            asyncio.ensure_future(engine.queue.take_slot(claim_of("b", REQUEST_TOKENS)))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        engine.queue.release_slot(slots.pop(), 1e5)
        slots += await asyncio.gather(*others)
        assert engine.in_flight == 3

    run(scenario)


def test_tenant_pays_for_a_request_that_held_up_the_others_until_it_expired() -> None:
    async def scenario() -> None:
        engine = Engine(in_flight=MAX_IN_FLIGHT)
        take = engine.queue.take_slot
        expiring = asyncio.ensure_future(take(claim_of("a", REQUEST_TOKENS, timeout_s=1.0)))
        await asyncio.sleep(0)
        second_a = asyncio.ensure_future(take(claim_of("a", REQUEST_TOKENS)))
        await asyncio.sleep(0)
        first_b = asyncio.ensure_future(take(claim_of("b", REQUEST_TOKENS)))
        with pytest.raises(OverloadedError):
            await expiring
        engine.in_flight -= 1
        engine.queue.dispatch()
        await first_b
        assert not second_a.done()
        second_a.cancel()

    run(scenario)


@pytest.mark.parametrize("is_retry", [False, True])
def test_only_charged_work_is_refunded(is_retry: bool) -> None:
    """Requests that join an answer and fail, or retries that are cancelled, give no credit."""

    async def scenario() -> None:
        engine, served = Engine(max_in_flight=1), Counter[str]()
        queue = engine.queue
        slot = await queue.take_slot(claim_of("c", 100.0))

        async def wait(tenant: str) -> Slot:
            return await queue.take_slot(claim_of(tenant, 100.0))

        waiting = {asyncio.create_task(wait(tenant)) for tenant in "ab" * 10}
        await asyncio.sleep(0)
        for _ in range(10):
            if is_retry:
                claim = replace(claim_of("a", 1000.0), is_retry=True)
                retry = asyncio.create_task(queue.take_slot(claim))
                await asyncio.sleep(0)
                queue.release_slot(slot, 100.0)
                retry.cancel()  # it has the slot, but does not know that yet
            else:
                claim = replace(claim_of("a", 1000.0), joins="replica")
                queue.release_slot(await queue.take_slot(claim), 0.0)
                queue.release_slot(slot, 100.0)
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            slot = done.pop().result()
            served[slot.claim.identity.tenant.name] += 1
        assert served == {"a": 5, "b": 5}
        for task in waiting:
            task.cancel()

    run(scenario)


def test_full_queue_rejects_lower_classes_for_higher_ones() -> None:
    async def scenario() -> None:
        engine = Engine(in_flight=MAX_IN_FLIGHT)

        def ask(tenant: str, priority: int) -> asyncio.Future[Slot]:
            claim = replace(claim_of(tenant, REQUEST_TOKENS), priority=priority)
            return asyncio.ensure_future(engine.queue.take_slot(claim))

        batch = [ask(f"batch{number % 256}", -1) for number in range(1024)]
        await asyncio.sleep(0)
        assert len(engine.queue) == 1024
        urgent = [ask("urgent", 0) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not any(task.done() for task in urgent)
        displaced = [task.exception() for task in batch if task.done()]
        assert len(displaced) == 10 + 1  # one entry stays free as long as one tenant has ten
        for error in displaced:
            assert isinstance(error, OverloadedError)
            assert error.headers()["retry-after"]
            assert "displaced" in error.message
        for task in (*batch, *urgent):
            task.cancel()

    run(scenario)


def test_pool_recovers_from_a_stall() -> None:
    async def scenario() -> None:
        engine = Engine(max_running=1)
        await drive(engine, [Traffic(Tenant("flood"), 5.0)], seconds=20.0)
        engine.max_running = MAX_RUNNING
        engine.running = 0
        result = await drive(engine, [Traffic(Tenant("flood"), 5.0)])
        assert goodput(result) >= 0.9 * CAPACITY

    run(scenario)


def test_wait_estimate_is_corrected_slowly_and_the_correction_is_forgotten() -> None:
    correction = WaitCorrection()
    for _ in range(1000):
        correction.learn("t", 1.0, 1.0, 0.0)
    for _ in range(100):
        correction.learn("t", 1.0, 2.0, 0.0)
    # 0.996 ** 100 = 0.67, so a third of the weight is on the last 100 waits, which were doubled.
    assert correction.factor("t", 0.0) == pytest.approx(1.33, abs=0.01)
    assert correction.factor("t", 3600.0) == pytest.approx(1.0, abs=0.01)
    assert correction.factor("other", 0.0) == 1.0


def test_refusal_says_when_to_retry() -> None:
    async def scenario() -> None:
        engine, loop = Engine(in_flight=MAX_IN_FLIGHT), asyncio.get_running_loop()
        capacity = engine.queue.capacity
        for _ in range(20):
            capacity.add_request(REQUEST_TOKENS)
        for _ in range(10):  # leaves 10 requests of 100 tokens, each takes 1 s: 1000 tokens/s
            capacity.remove_request(REQUEST_TOKENS, REQUEST_TOKENS, 1.0)
        tasks = [
            asyncio.ensure_future(engine.queue.take_slot(claim_with_timeout(900.0)))
            for _ in range(80)
        ]
        await asyncio.sleep(0)
        before_s = loop.time()
        with pytest.raises(OverloadedError) as refused:
            await engine.queue.take_slot(claim_with_timeout(5.0))
        assert loop.time() == before_s
        assert refused.value.retry_after_s == pytest.approx(80 * REQUEST_TOKENS / 1000)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    run(scenario)


def test_all_requests_of_a_lost_replica_are_queued_again() -> None:
    async def scenario() -> None:
        engine, num_requests = Engine(), 256
        now_s = asyncio.get_running_loop().time()
        # Together they exceed the queue's limit of tokens, and the tenant's part of it.
        claim = Claim(Identity(Tenant("t")), 10_000.0, 0, 0, now_s + 60, now_s + 60)
        slots = [await engine.queue.take_slot(claim) for _ in range(num_requests)]
        engine.max_in_flight = 0  # the replica is lost
        for slot in slots:
            engine.queue.release_slot(slot, is_abandoned=True)
        retries = [
            asyncio.ensure_future(engine.queue.take_slot(replace(claim, is_retry=True)))
            for _ in range(num_requests)
        ]
        await asyncio.sleep(0)
        assert not any(retry.done() for retry in retries)
        assert len(engine.queue) == num_requests
        with pytest.raises(OverloadedError):  # new requests are still limited
            await engine.queue.take_slot(claim)
        engine.max_in_flight = MAX_IN_FLIGHT
        engine.queue.dispatch()
        await asyncio.gather(*retries)

    run(scenario)


WORK = st.sampled_from([0.1, 3.3, 100.0, 1e9])
LOAD = st.builds(Load, st.integers(0, 60), st.integers(0, 60), st.floats(0, 1.2))
STEPS = st.lists(
    st.tuples(st.just("take"), WORK)
    | st.tuples(st.just("retry"), WORK)
    | st.tuples(st.just("join"), WORK)
    | st.tuples(st.just("end"), st.integers(0, 20))
    | st.tuples(st.just("cancel"), st.integers(0, 20))
    | st.tuples(st.just("report"), LOAD)
    | st.tuples(st.just("pause"), st.sampled_from([0.05, 0.5, 30.0, 70.0]))
    | st.tuples(st.just("slots"), st.integers(0, 40)),
    max_size=80,
)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(STEPS)
def test_room_is_what_the_next_request_gets(steps: list[tuple[str, Any]]) -> None:
    async def scenario() -> None:
        engine, loop = Engine(), asyncio.get_running_loop()
        queue, slots = engine.queue, list[Slot]()
        takes: list[asyncio.Task[None]] = []

        async def take(claim: Claim) -> None:
            with suppress(OverloadedError):
                slots.append(await queue.take_slot(claim))

        for step, argument in steps:
            had_room, num_slots = queue.has_room, len(slots)
            if step in ("take", "retry", "join"):
                claim = Claim(work_tokens=argument, expires_s=loop.time() + 20)
                claim = replace(
                    claim, is_retry=step == "retry", joins="r" if step == "join" else None
                )
                takes.append(asyncio.create_task(take(claim)))
            elif step == "end" and slots:
                slot = slots.pop(argument % num_slots)
                queue.release_slot(slot, slot.claim.work_tokens)
            elif step == "cancel" and takes:
                takes[argument % len(takes)].cancel()
            elif step == "report":
                queue.observe_loads([argument])
            elif step == "pause":
                await asyncio.sleep(argument)
            elif step == "slots":
                engine.max_in_flight = argument
                queue.dispatch()
            for _ in range(4):  # until the tasks have run
                await asyncio.sleep(0)
            if step == "take":
                assert (len(slots) > num_slots) == had_room
            assert queue.capacity.in_flight == engine.in_flight == len(slots)
            # Nothing waits next to room.
            assert not (len(queue) and queue.capacity.has_room and engine.has_room)
        for each in takes:
            each.cancel()
        await asyncio.gather(*takes, return_exceptions=True)

    run(scenario)
