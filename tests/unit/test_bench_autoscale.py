"""Parts of ``bench autoscale``: the sweep, the oracle, Ray's policy, the traces."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from benchmarks.autoscale import LOADS, MIN_ATTAINMENT, bisect_highest
from benchmarks.autoscale.policies import (
    STEP_S,
    OraclePolicy,
    RayPolicy,
    RaySettings,
    work_rates,
)
from benchmarks.autoscale.traces import bursty, daily
from cluster.autoscaling import PoolSignals
from cluster.config import SimConfig
from cluster.simulation.requests import Trace, TraceRequest


@dataclass(frozen=True)
class FakeRun:
    value: float
    attainment: float

    @property
    def order(self) -> tuple[bool, float]:
        return self.attainment < MIN_ATTAINMENT, 1 / self.value


@pytest.mark.parametrize(("limit", "expected"), [(0.7, 0.7), (2.0, max(LOADS)), (0.1, min(LOADS))])
def test_bisection_finds_the_highest_value_with_enough_attainment(
    limit: float, expected: float
) -> None:
    tried: list[float] = []

    def run_with(value: float) -> Any:
        tried.append(value)
        return FakeRun(value, 1.0 if value <= limit else 0.9)

    best: Any = bisect_highest(LOADS, run_with)
    assert best.value == expected
    assert len(tried) <= 1 + math.ceil(math.log2(len(LOADS)))  # the lowest value, then bisection


def test_the_oracle_scales_up_one_startup_time_early_and_down_at_once() -> None:
    rates = np.array([1.0] * 100 + [3.0] * 50 + [1.0] * 100)
    oracle = OraclePolicy(rates, load=0.5, startup_s=60.0)
    targets = [oracle.decide(step * STEP_S, PoolSignals(0, 0)).target for step in range(250)]
    first = targets.index(6)
    needed = 100 - 60 / STEP_S  # the step at which a start is in time for step 100
    assert needed - 2 <= first <= needed
    assert targets == [2] * first + [6] * (150 - first) + [2] * 100


def test_work_rates_are_the_replicas_kept_busy() -> None:
    # Each second, one request: 100 tokens of 1 ms prefill, and 10 of 10 ms decoding.
    engine = SimConfig(prefill_s_per_token=1e-3, decode_s_per_token=0.1, batch_slowdown=0.1)
    requests = [TraceRequest(float(at), 100, 10) for at in range(200)]
    rates = work_rates(Trace("even", requests, 512), engine)
    assert rates[20:-20] == pytest.approx(0.2, rel=0.05)


def test_rays_policy_waits_for_its_delays() -> None:
    policy = RayPolicy(RaySettings(4.0, upscale_delay_s=30.0, downscale_delay_s=60.0), 1, 9)
    target, targets = 1, []
    for tick in range(100):
        ongoing = 16.0 if tick < 40 else 4.0
        signals = PoolSignals(target=target, running=target, in_flight=ongoing)
        target = policy.decide(2.0 * tick, signals).target
        targets.append(target)
    # The load falls at 80 s. At 82 s, the report of 50 s leaves the look-back window of 30 s; the
    # mean of the others, 16, 16 and 4 requests, needs 3 replicas.
    up, down = 30 // 2, (82 + 60) // 2
    assert targets == [1] * up + [4] * (down - up) + [1] * (100 - down)


def test_a_day_has_its_mean_rate_and_a_peak_at_noon() -> None:
    trace = daily(mean=0.2).make_trace("daily", 3)
    hours = np.histogram([r.arrival_s for r in trace.requests], bins=24, range=(0, 86_400))[0]
    assert len(trace.requests) == pytest.approx(0.2 * 86_400, rel=0.05)
    # The rate at night is a quarter of the mean, so the peak is at least four times as high.
    assert hours[11:13].sum() > 4 * (hours[0] + hours[-1])


def test_bursty_traces_depend_on_the_seed_and_have_at_least_the_base_rate() -> None:
    first, again = (bursty(3, hours=1.0, base=3.0).make_trace("bursty", 3) for _ in range(2))
    assert first == again
    assert first != bursty(4, hours=1.0, base=3.0).make_trace("bursty", 4)
    assert len(first.requests) >= 0.9 * 3.0 * 3600  # 10 % for chance
