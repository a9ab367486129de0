"""Admission after an hour of mixed, partly abandoned traffic, in virtual time."""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from benchmarks.overload.virtual_time import VirtualLoop
from cluster.admission import Identity, PoolCapacity, QueueLimits, Tenant
from cluster.errors import OverloadedError
from cluster.gateway.pools.queue import AdmissionQueue
from cluster.gateway.pools.slots import Claim, Slot
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.gateway.recording.request_log import RequestLog
from cluster.load import Load
from cluster.metrics import Registry
from cluster.routing import TokenEstimator
from cluster.usage import Usage

STEP_S = 0.1
TENANT = Identity(Tenant("t"))
QUEUE_TIMEOUT_S = 60.0


@dataclass(eq=False)
class Work:
    """A request inside the engine."""

    tokens_left: float
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Engine:
    """Engine with a batch of 32 that generates 200 tokens/s, at most 25 for each request.

    Like vLLM behind a proxy that does not notice disconnects, it finishes some abandoned requests.
    """

    queue: AdmissionQueue = field(init=False)
    estimator: TokenEstimator = field(default_factory=lambda: TokenEstimator(generates=True))
    num_ready: int = 1
    in_flight: int = 0
    running: list[Work] = field(default_factory=list)
    waiting: list[Work] = field(default_factory=list)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        meter = PoolMeter("pool", RequestSinks(Registry(), RequestLog(0.0)))
        limits = QueueLimits(2e6, 1024)
        self.queue = AdmissionQueue("pool", limits, PoolCapacity(0.25), self, meter)

    def take_slot(self, claim: Claim) -> Slot | None:
        if self.in_flight >= 256:
            return None
        self.in_flight += 1
        return Slot(None, None, claim, asyncio.get_running_loop().time())

    def release_slot(self, slot: Slot, usage: Usage | None) -> float:
        self.in_flight -= 1
        return asyncio.get_running_loop().time() - slot.since_s

    async def run(self) -> None:
        reported = None
        while True:
            await asyncio.sleep(STEP_S)
            while self.waiting and len(self.running) < 32:
                self.running.append(self.waiting.pop(0))
            for work in list(self.running):
                work.tokens_left -= STEP_S * min(25.0, 200.0 / len(self.running))
                if work.tokens_left <= 0:
                    work.done.set()
                    self.running.remove(work)
            if self.running:
                self.idle.clear()
            else:
                self.idle.set()
            load = Load(len(self.running), len(self.waiting))
            if load != reported:  # as links do
                reported = load
                self.queue.observe_loads([load])

    async def serve(
        self,
        tokens: float,
        *,
        patience_s: float = float("inf"),
        notices: bool = True,
        timeout_s: float = float("inf"),
    ) -> None:
        """Serve a request whose client disconnects ``patience_s`` after it got a slot."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        expires_s = min(deadline_s, asyncio.get_running_loop().time() + QUEUE_TIMEOUT_S)
        estimate = self.estimator.work_tokens(self.estimator.view_request(200))
        claim = Claim(TENANT, estimate, 200, expires_s=expires_s, deadline_s=deadline_s)
        slot = await self.queue.take_slot(claim)
        async with asyncio.timeout(None if patience_s == float("inf") else patience_s):
            work = Work(tokens)
            self.waiting.append(work)
            try:
                await work.done.wait()
            except asyncio.CancelledError:
                self.queue.release_slot(slot, None)
                if notices:
                    works = self.running if work in self.running else self.waiting
                    works.remove(work)
                raise
            usage = Usage(50, 0, int(tokens))
            self.estimator.learn_usage(200, usage)
            self.queue.release_slot(slot, float(usage.computed_tokens), usage)


async def send_mixed_traffic(engine: Engine, seconds: float, seed: int) -> None:
    """Send short and long requests, of which clients abandon a third, and bursts of timeouts."""
    draw, loop = random.Random(seed), asyncio.get_running_loop()
    end_s = loop.time() + seconds

    async def send(max_patience_s: float) -> None:
        tokens = draw.choices((30.0, 250.0, 2000.0), (50, 25, 25))[0]
        is_abandoned = max_patience_s < 1.0 or draw.random() < 1 / 3
        patience_s = draw.uniform(0.2, max_patience_s) if is_abandoned else float("inf")
        with suppress(TimeoutError, OverloadedError):
            await engine.serve(tokens, patience_s=patience_s, notices=draw.random() < 0.2)

    async with asyncio.TaskGroup() as group:
        burst_s = 0.0
        while loop.time() < end_s:
            if loop.time() >= burst_s:
                burst_s = loop.time() + 595.0  # the last burst begins 30 s before the end
                for _ in range(100):
                    group.create_task(send(0.5))
            group.create_task(send(20.0))
            await asyncio.sleep(draw.expovariate(0.2))


async def count_admitted(engine: Engine, timeout_s: float = float("inf")) -> int:
    """Send 96 short requests at a concurrency of 32; return the number of answers."""
    left = iter(range(96))
    admitted = 0

    async def client() -> None:
        nonlocal admitted
        for _ in left:
            try:
                await engine.serve(40.0, timeout_s=timeout_s)
            except OverloadedError:
                continue
            admitted += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(32):
            group.create_task(client())
    return admitted


# With these seeds, a pool once rejected 70 to 85 of the 96 requests for a wait of minutes.
@pytest.mark.parametrize("seed", [3, 6, 8, 10])
@pytest.mark.parametrize("timeout_s", [float("inf"), 40.0])
def test_an_idle_pool_admits_a_normal_burst_whatever_it_served_before(
    seed: int, timeout_s: float
) -> None:
    async def scenario() -> None:
        engine = Engine()
        running = asyncio.ensure_future(engine.run())
        await send_mixed_traffic(engine, 3600.0, seed)
        await engine.idle.wait()
        # 96 * 40 tokens at 200 tokens/s take 20 s, so no request waits for long.
        assert await count_admitted(engine, timeout_s) == 96
        running.cancel()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
