"""The load: how much of whom, and what its outcomes say. Knows no server."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from benchmarks.overload.outcome import Ask, Outcome, Result
from benchmarks.rounds import percentile

SEQUENCES = 16
"""Requests in the engine's batch."""
TOKENS = 16
"""Of each answer."""
STEP_S = 0.03
"""For one token of each of them."""
WEIGHTS: Mapping[str, float] = {"flood": 1.0, "small": 1.0, "heavy": 3.0}
BODY = {"prompt": "Tell me something.", "max_tokens": TOKENS, "temperature": 0}


@dataclass(frozen=True, slots=True)
class Phase:
    """So many times the capacity, by tenant."""

    name: str
    load: tuple[tuple[str, float], ...]


LEVELS = tuple(Phase(f"{times}x", (("flood", float(times)),)) for times in (1, 2, 3, 5))
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
    def capacity_rps(self) -> float:
        """Requests a second that the engine can do; it prefills in no time."""
        return SEQUENCES / (TOKENS * STEP_S)

    async def run(
        self, running: AbstractAsyncContextManager[Ask], seed: int
    ) -> dict[Phase, list[Outcome]]:
        """The outcomes of every phase."""
        draw = random.Random(seed)
        found = {}
        async with running as ask:
            for phase in self.phases:
                found[phase] = await self._phase(phase, ask, draw)
                await asyncio.sleep(self.deadline_s + self.pause_s)
        return found

    def rate(self, outcomes: Sequence[Outcome], result: Result, tenant: str = "") -> float:
        """Requests a second that ended so, by when they ended."""
        num = sum(
            o.result == result
            and tenant in ("", o.tenant)
            and self.warm_up_s <= o.asked_s + o.seconds < self.seconds
            for o in outcomes
        )
        return num / (self.seconds - self.warm_up_s)

    def counted(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Those that were asked after the warm-up."""
        return [one for one in outcomes if one.asked_s >= self.warm_up_s]

    async def _phase(self, phase: Phase, ask: Ask, draw: random.Random) -> list[Outcome]:
        arrivals = sorted(
            (at_s, tenant) for tenant, times in phase.load for at_s in self._arrivals(times, draw)
        )
        outcomes: list[Outcome] = []
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for at_s, tenant in arrivals:
                await asyncio.sleep(at_s - (time.perf_counter() - began))
                group.create_task(self._one(ask, tenant, at_s, outcomes))
        return outcomes

    def _arrivals(self, times: float, draw: random.Random) -> list[float]:
        rate, at_s, found = times * self.capacity_rps, 0.0, []
        while (at_s := at_s + draw.expovariate(rate)) < self.seconds:
            found.append(at_s)
        return found

    async def _one(self, ask: Ask, tenant: str, at_s: float, outcomes: list[Outcome]) -> None:
        began = time.perf_counter()
        status = await ask(tenant)
        seconds = time.perf_counter() - began
        outcomes.append(Outcome(tenant, at_s, seconds, status, seconds <= self.deadline_s))


def numbers(scenario: Scenario, outcomes: Mapping[Phase, Sequence[Outcome]]) -> dict[str, float]:
    """The benchmark's keys."""
    goodputs = [scenario.rate(outcomes[level], "good") for level in LEVELS]
    refused = [
        one.seconds * 1e3
        for of_phase in outcomes.values()
        for one in scenario.counted(of_phase)
        if one.result == "refused"
    ]
    every = [one for of_phase in outcomes.values() for one in of_phase]
    return {
        "goodput_ratio": goodputs[-1] / max(goodputs),
        "fair_share_error": max(
            _small_error(scenario, outcomes), _floods_error(scenario, outcomes)
        ),
        "small_share_error": _small_error(scenario, outcomes),
        "refused_ms_p99": percentile(refused, 99) if refused else 0.0,
        "failed_requests": float(sum(one.result == "failed" for one in every)),
    }


def _small_error(scenario: Scenario, outcomes: Mapping[Phase, Sequence[Outcome]]) -> float:
    """The part of what it asked for, and is entitled to, that the small tenant did not get."""
    asked = [one for one in scenario.counted(outcomes[SMALL]) if one.tenant == "small"]
    return 1 - sum(one.result == "good" for one in asked) / max(1, len(asked))


def _floods_error(scenario: Scenario, outcomes: Mapping[Phase, Sequence[Outcome]]) -> float:
    """How far the shares of two floods lie from their weights', relative to these."""
    tenants = [tenant for tenant, _ in FLOODS.load]
    good = {tenant: scenario.rate(outcomes[FLOODS], "good", tenant) for tenant in tenants}
    total = sum(good.values()) or 1.0
    weights = {tenant: WEIGHTS[tenant] for tenant in tenants}
    return max(
        abs(good[tenant] / total / (weight / sum(weights.values())) - 1)
        for tenant, weight in weights.items()
    )
