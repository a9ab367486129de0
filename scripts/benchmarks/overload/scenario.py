"""The load: how much of whom, and what its outcomes say. Knows no server.

The engine is paced, so that the machine sets no limit: a step of 40 ms is long beside an event
loop's lag of 2 ms, and 250 requests a second at five times the capacity take a tenth of a core.
Answers differ in length, or the whole batch would end at once and a window of 10 s would hold one
batch more or less, which is 6 % of it. Therefore tokens are counted, not requests.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from benchmarks.endpoint import TargetError
from benchmarks.overload.outcome import Ask, Measured, Outcome, Result
from benchmarks.rounds import percentile

SEQUENCES = 32
"""Requests in the engine's batch."""
TOKENS = 16
"""Of an answer on average; each has half of it to one and a half times it."""
STEP_S = 0.04
"""For one token of each of them."""
WEIGHTS: Mapping[str, float] = {"flood": 1.0, "small": 1.0, "heavy": 3.0}
BODY = {"prompt": "Tell me something.", "temperature": 0, "ignore_eos": True}

_TICK_S = 0.01
_LAG_S = 0.02  # a loop that is later than this was kept from running
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Phase:
    """So many times the capacity, by tenant."""

    name: str
    load: tuple[tuple[str, float], ...]


LEVELS = tuple(Phase(f"{times}x", (("flood", float(times)),)) for times in (1, 2, 5))
SMALL = Phase("5x beside 0.25x", (("flood", 5.0), ("small", 0.25)))
FLOODS = Phase("3x beside 3x of weight 3", (("flood", 3.0), ("heavy", 3.0)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """Every phase, one after the other."""

    seconds: float = 12.0
    warm_up_s: float = 2.0
    """Of each phase; what is asked in it is not counted."""
    deadline_s: float = 3.0
    pause_s: float = 0.5
    phases: Sequence[Phase] = field(default=(*LEVELS, SMALL, FLOODS))

    @property
    def capacity(self) -> float:
        """Tokens a second that the engine can make; it prefills in no time."""
        return SEQUENCES / STEP_S

    @property
    def most_s(self) -> float:
        """How long a round takes at most: each phase ends with its last answer."""
        return len(self.phases) * (self.seconds + self.deadline_s + self.pause_s)

    async def run(
        self, running: AbstractAsyncContextManager[Ask], seed: int
    ) -> dict[Phase, Measured]:
        """Every phase, measured.

        Raises:
            TargetError: answers are missing long after their deadline.
        """
        draw = random.Random(seed)
        found = {}
        async with running as ask:
            for phase in self.phases:
                found[phase] = await self._phase(phase, ask, draw)
                await asyncio.sleep(self.pause_s)
        return found

    def rate(self, measured: Measured, result: Result, tenant: str = "") -> float:
        """Tokens a second that were asked for by requests which ended so, by when they ended."""
        num = sum(
            one.tokens
            for one in measured.outcomes
            if one.result == result
            and tenant in ("", one.tenant)
            and self.warm_up_s <= one.asked_s + one.seconds < self.seconds
        )
        return num / (self.seconds - self.warm_up_s)

    def counted(self, measured: Measured) -> list[Outcome]:
        """Those that were asked after the warm-up."""
        return [one for one in measured.outcomes if one.asked_s >= self.warm_up_s]

    async def _phase(self, phase: Phase, ask: Ask, draw: random.Random) -> Measured:
        outcomes: list[Outcome] = []
        lag = _Lag()
        watch = asyncio.create_task(lag.watch())
        limit_s = self.seconds + self.deadline_s + _GRACE_S
        try:
            async with asyncio.timeout(limit_s):
                await self._offer(phase, ask, draw, outcomes)
        except TimeoutError:
            raise TargetError(f"{phase.name}: answers are missing after {limit_s:g} s") from None
        finally:
            watch.cancel()
        return Measured(outcomes, lag.stalled_s)

    async def _offer(
        self, phase: Phase, ask: Ask, draw: random.Random, outcomes: list[Outcome]
    ) -> None:
        arrivals = sorted(
            (at_s, tenant, draw.randint(TOKENS // 2, TOKENS * 3 // 2))
            for tenant, times in phase.load
            for at_s in self._arrivals(times, draw)
        )
        began = time.perf_counter()

        async def one(tenant: str, at_s: float, tokens: int) -> None:
            asked = time.perf_counter()
            status = await ask(tenant, tokens)
            seconds = time.perf_counter() - asked
            in_time = seconds <= self.deadline_s
            outcomes.append(Outcome(tenant, tokens, at_s, seconds, status, in_time))

        async with asyncio.TaskGroup() as group:
            for at_s, tenant, tokens in arrivals:
                await asyncio.sleep(at_s - (time.perf_counter() - began))
                group.create_task(one(tenant, at_s, tokens))

    def _arrivals(self, times: float, draw: random.Random) -> list[float]:
        rate, at_s, found = times * self.capacity / TOKENS, 0.0, []
        while (at_s := at_s + draw.expovariate(rate)) < self.seconds:
            found.append(at_s)
        return found


class _Lag:
    """How long this event loop was kept from running."""

    def __init__(self) -> None:
        self.stalled_s = 0.0

    async def watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late_s = time.perf_counter() - began - _TICK_S
            self.stalled_s += late_s if late_s > _LAG_S else 0.0


def numbers(scenario: Scenario, measured: Mapping[Phase, Measured]) -> dict[str, float]:
    """The benchmark's keys."""
    goodputs = [scenario.rate(measured[level], "good") for level in LEVELS]
    refused = [
        one.seconds * 1e3
        for of_phase in measured.values()
        for one in scenario.counted(of_phase)
        if one.result == "refused"
    ]
    every = [one for of_phase in measured.values() for one in of_phase.outcomes]
    small_error = _small_error(scenario, measured[SMALL])
    return {
        "goodput_ratio": goodputs[-1] / max(goodputs),
        "fair_share_error": max(small_error, _floods_error(scenario, measured[FLOODS])),
        "small_share_error": small_error,
        "refused_ms_p99": percentile(refused, 99) if refused else 0.0,
        "failed_requests": float(sum(one.result == "failed" for one in every)),
        "stalled_share": max(one.stalled_s for one in measured.values()) / scenario.seconds,
    }


def _small_error(scenario: Scenario, measured: Measured) -> float:
    """The part of what it asked for, and is entitled to, that the small tenant did not get."""
    asked = [one for one in scenario.counted(measured) if one.tenant == "small"]
    return 1 - sum(one.result == "good" for one in asked) / max(1, len(asked))


def _floods_error(scenario: Scenario, measured: Measured) -> float:
    """How far the shares of two floods lie from their weights', relative to these."""
    tenants = [tenant for tenant, _ in FLOODS.load]
    good = {tenant: scenario.rate(measured, "good", tenant) for tenant in tenants}
    total = sum(good.values()) or 1.0
    weights = {tenant: WEIGHTS[tenant] for tenant in tenants}
    return max(
        abs(good[tenant] / total / (weight / sum(weights.values())) - 1)
        for tenant, weight in weights.items()
    )
