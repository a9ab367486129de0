"""Load phases of the overload benchmark and what their outcomes mean. Independent of the server.

The engine is paced so that the machine is not the limit: a step of 40 ms is long compared with an
event loop's lag of 2 ms, and 250 requests/s at five times the capacity use a tenth of a core.
Response lengths vary. With equal lengths, the whole batch would end at once, and a window of 10 s
would have one batch more or less, which is 6 % of it. For the same reason, rates count tokens, not
requests.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.endpoint import TargetError
from benchmarks.rounds import percentile

SEQUENCES = 32
"""Batch size of the engine in requests."""
MEAN_TOKENS = 16
"""Mean completion tokens; requests have half to one and a half times as many."""
STEP_S = 0.04
"""Duration of an engine step, which generates one token for each request of the batch."""
WEIGHTS: Mapping[str, float] = {"flood": 1.0, "small": 1.0, "heavy": 3.0}
"""Fair-share weight by tenant."""
BODY = {"prompt": "Tell me something.", "temperature": 0, "ignore_eos": True}

_TICK_S = 0.01
_MAX_LAG_S = 0.02  # a larger lag means that the process did not get the CPU
_GRACE_S = 30.0
_EVENT, _LAST_EVENT = b"data: {", b"data: [DONE]"
_TAIL_BYTES = 64  # longer than both, and than what follows the last event

Outcome = Literal["good", "late", "refused", "failed"]

VICTIM = "small"
"""Tenant whose requests are streamed, so that their TTFT is measured."""


@dataclass(frozen=True, slots=True)
class Response:
    """Complete response."""

    status: int
    """HTTP status; 0 if the response is incomplete."""
    ttft_s: float | None = None
    """Seconds until the first token; None if the response is not streamed."""


class ResponseReader:
    """Status and time of the first token of a response, from the pieces of its body."""

    def __init__(self, *, streamed: bool) -> None:
        self._streamed = streamed
        self._began = time.perf_counter()
        self._ttft_s: float | None = None
        self._end = b""

    def feed(self, data: bytes) -> None:
        self._end = self._end[-_TAIL_BYTES:] + data
        if self._streamed and self._ttft_s is None and _EVENT in self._end:
            self._ttft_s = time.perf_counter() - self._began

    def response(self, status: int) -> Response:
        """Return the response, after its last piece; it is incomplete if a stream has no end."""
        is_cut = self._streamed and status == 200 and _LAST_EVENT not in self._end
        return Response(0 if is_cut else status, self._ttft_s)


SendRequest = Callable[[str, int], Awaitable[Response]]
"""Send a request of a tenant for a number of tokens; return the full response."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One finished request."""

    tenant: str
    tokens: int
    """Requested completion tokens."""
    sent_s: float
    """Time since the start of the phase."""
    seconds: float
    """Time until the response was complete."""
    status: int
    in_time: bool
    ttft_s: float | None = None
    """Seconds until the first token, of a streamed response."""

    @property
    def outcome(self) -> Outcome:
        """Outcome by status and deadline."""
        if self.status == 200:
            return "good" if self.in_time else "late"
        if self.status == 408:  # Serve ends requests at their deadline with 408
            return "late"
        return "refused" if self.status in (429, 503) else "failed"


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """All requests of one phase."""

    requests: Sequence[RequestResult]
    stalled_s: float
    """Time in which the client's event loop did not run because the machine was busy."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Load as a multiple of the capacity, by tenant."""

    name: str
    load: tuple[tuple[str, float], ...]


LEVELS = tuple(Phase(f"{times}x", (("flood", float(times)),)) for times in (1, 2, 5))
SMALL = Phase("5x and 0.25x", (("flood", 5.0), (VICTIM, 0.25)))
ALONE = Phase("0.25x alone", ((VICTIM, 0.25),))
FLOODS = Phase("3x and 3x with weight 3", (("flood", 3.0), ("heavy", 3.0)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """Phases that run one after the other."""

    seconds: float = 12.0
    """Duration of each phase."""
    warm_up_s: float = 2.0
    """Time at the start of each phase whose requests do not count."""
    deadline_s: float = 3.0
    pause_s: float = 0.5
    phases: Sequence[Phase] = field(default=(*LEVELS, SMALL, FLOODS, ALONE))

    @property
    def capacity(self) -> float:
        """Tokens per second that the engine can generate; its prefill takes no time."""
        return SEQUENCES / STEP_S

    @property
    def max_round_s(self) -> float:
        """Longest duration of a round; each phase ends with its last response."""
        return len(self.phases) * (self.seconds + self.deadline_s + self.pause_s)

    async def run(
        self, server: AbstractAsyncContextManager[SendRequest], seed: int
    ) -> dict[Phase, PhaseResult]:
        """Run every phase.

        Raises:
            TargetError: Responses are missing long after their deadline.
        """
        rng = random.Random(seed)
        results = {}
        async with server as send:
            for phase in self.phases:
                results[phase] = await self._run_phase(phase, send, rng)
                await asyncio.sleep(self.pause_s)
        return results

    def rate(self, result: PhaseResult, outcome: Outcome, tenant: str = "") -> float:
        """Return tokens per second of the requests that ended with an outcome after the warm-up."""
        num = sum(
            one.tokens
            for one in result.requests
            if one.outcome == outcome
            and tenant in ("", one.tenant)
            and self.warm_up_s <= one.sent_s + one.seconds < self.seconds
        )
        return num / (self.seconds - self.warm_up_s)

    def after_warm_up(self, result: PhaseResult) -> list[RequestResult]:
        """Return the requests that were sent after the warm-up."""
        return [one for one in result.requests if one.sent_s >= self.warm_up_s]

    async def _run_phase(self, phase: Phase, send: SendRequest, rng: random.Random) -> PhaseResult:
        results: list[RequestResult] = []
        lag = _LagMonitor()
        monitor = asyncio.create_task(lag.run())
        limit_s = self.seconds + self.deadline_s + _GRACE_S
        try:
            async with asyncio.timeout(limit_s):
                await self._send_requests(phase, send, rng, results)
        except TimeoutError:
            raise TargetError(f"Phase {phase.name}: no response within {limit_s:g} s.") from None
        finally:
            monitor.cancel()
        return PhaseResult(results, lag.stalled_s)

    async def _send_requests(
        self, phase: Phase, send: SendRequest, rng: random.Random, results: list[RequestResult]
    ) -> None:
        arrivals = sorted(
            (at_s, tenant, rng.randint(MEAN_TOKENS // 2, MEAN_TOKENS * 3 // 2))
            for tenant, times in phase.load
            for at_s in self._draw_arrivals(times, rng)
        )
        began = time.perf_counter()

        async def send_one(tenant: str, at_s: float, tokens: int) -> None:
            sent = time.perf_counter()
            response = await send(tenant, tokens)
            seconds = time.perf_counter() - sent
            in_time, status = seconds <= self.deadline_s, response.status
            one = RequestResult(tenant, tokens, at_s, seconds, status, in_time, response.ttft_s)
            results.append(one)

        async with asyncio.TaskGroup() as group:
            for at_s, tenant, tokens in arrivals:
                await asyncio.sleep(at_s - (time.perf_counter() - began))
                group.create_task(send_one(tenant, at_s, tokens))

    def _draw_arrivals(self, times: float, rng: random.Random) -> list[float]:
        rate, at_s, arrivals = times * self.capacity / MEAN_TOKENS, 0.0, []
        while (at_s := at_s + rng.expovariate(rate)) < self.seconds:
            arrivals.append(at_s)
        return arrivals


class _LagMonitor:
    """Sum of the times in which the event loop did not run."""

    def __init__(self) -> None:
        self.stalled_s = 0.0

    async def run(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late_s = time.perf_counter() - began - _TICK_S
            self.stalled_s += late_s if late_s > _MAX_LAG_S else 0.0


def compute_keys(scenario: Scenario, results: Mapping[Phase, PhaseResult]) -> dict[str, float]:
    """Return the benchmark's keys for one round."""
    goodputs = [scenario.rate(results[level], "good") for level in LEVELS]
    refused_ms = [
        one.seconds * 1e3
        for result in results.values()
        for one in scenario.after_warm_up(result)
        if one.outcome == "refused"
    ]
    requests = [one for result in results.values() for one in result.requests]
    beside_s, alone_s = (_victim_ttft_s(scenario, results[phase]) for phase in (SMALL, ALONE))
    small_error = _small_tenant_error(scenario, results[SMALL])
    return {
        "goodput_ratio": goodputs[-1] / max(goodputs),
        "fair_share_error": max(small_error, _weights_error(scenario, results[FLOODS])),
        "small_share_error": small_error,
        "victim_ttft_p99_ratio": beside_s / alone_s,
        "victim_ttft_ms_p99": beside_s * 1e3,
        "victim_alone_ttft_ms_p99": alone_s * 1e3,
        "refused_ms_p99": percentile(refused_ms, 99) if refused_ms else 0.0,
        "failed_requests": float(sum(one.outcome == "failed" for one in requests)),
        "stalled_share": max(one.stalled_s for one in results.values()) / scenario.seconds,
    }


def _small_tenant_error(scenario: Scenario, result: PhaseResult) -> float:
    """Return the share of the small tenant's requests, all within its fair share, that failed."""
    sent = [one for one in scenario.after_warm_up(result) if one.tenant == "small"]
    return 1 - sum(one.outcome == "good" for one in sent) / max(1, len(sent))


def _victim_ttft_s(scenario: Scenario, result: PhaseResult) -> float:
    """Return the small tenant's TTFT p99; a request without a token counts as its deadline."""
    sent = [one for one in scenario.after_warm_up(result) if one.tenant == VICTIM]
    return percentile([one.ttft_s or scenario.deadline_s for one in sent], 99)


def _weights_error(scenario: Scenario, result: PhaseResult) -> float:
    """Return the largest relative deviation of the floods' shares from their weights."""
    tenants = [tenant for tenant, _ in FLOODS.load]
    good = {tenant: scenario.rate(result, "good", tenant) for tenant in tenants}
    total = sum(good.values()) or 1.0
    weights = {tenant: WEIGHTS[tenant] for tenant in tenants}
    return max(
        abs(good[tenant] / total / (weight / sum(weights.values())) - 1)
        for tenant, weight in weights.items()
    )
