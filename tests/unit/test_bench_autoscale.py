"""The autoscaling benchmark's parts: the sweep, the oracle, Ray's policy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.autoscale import LOADS, highest
from benchmarks.autoscale.oracle import STEP_S, Oracle, work_rates
from benchmarks.autoscale.ray_policy import RayPolicy, RaySettings
from benchmarks.autoscale.traces import bursty, daily
from cluster.autoscaling import PoolSignals
from cluster.config import SimConfig
from cluster.simulation.requests import Trace, TraceRequest


@pytest.mark.parametrize(("limit", "found"), [(0.7, 0.7), (2.0, 1.0), (0.1, 0.4)])
def test_a_sweep_ends_at_the_highest_value_that_attains_enough(limit: float, found: float) -> None:
    tried: list[float] = []

    def once(value: float) -> Any:
        tried.append(value)
        attainment = 1.0 if value <= limit else 0.9
        hours = 1 / value
        order = (attainment < 0.99, hours)
        return SimpleNamespace(value=value, attainment=attainment, hours=hours, order=order)

    assert highest(LOADS, once).value == found
    assert len(tried) <= 7


def test_the_oracle_has_replicas_when_they_are_needed_and_not_after() -> None:
    rates = np.array([1.0] * 100 + [3.0] * 50 + [1.0] * 100)
    oracle = Oracle(rates, load=0.5, startup_s=60.0)
    targets = {
        step: oracle.decide(step * STEP_S, PoolSignals(0, 0)).target for step in range(len(rates))
    }
    assert {targets[step] for step in range(0, 68)} == {2}
    assert {targets[step] for step in range(70, 150)} == {6}
    assert {targets[step] for step in range(150, 250)} == {2}


def test_the_work_of_all_requests_is_known() -> None:
    engine = SimConfig(prefill_s_per_token=1e-3, decode_s_per_token=0.1, batch_slowdown=0.1)
    requests = [TraceRequest(float(at), 100, 10) for at in range(200)]
    rates = work_rates(Trace("even", requests, 512), engine)
    assert rates[20:-20] == pytest.approx(0.2, rel=0.05)


def test_rays_policy_waits_for_its_delays() -> None:
    policy = RayPolicy(RaySettings(4.0, upscale_delay_s=30.0, downscale_delay_s=60.0), 1, 9)
    target, targets = 1, []
    for tick in range(100):
        ongoing = 16.0 if tick < 40 else 4.0
        seen = PoolSignals(target=target, running=target, ongoing=ongoing)
        target = policy.decide(2.0 * tick, seen).target
        targets.append(target)
    assert targets[:15] == [1] * 15
    assert targets[15:40] == [4] * 25
    assert targets[-1] == 1
    assert targets.index(1, 40) * 2.0 >= 80.0 + 60.0


def test_traces_have_the_rates_that_they_say() -> None:
    quiet = daily(mean=0.2).trace("daily", 3)
    hours = np.histogram([r.arrival_s for r in quiet.requests], bins=24, range=(0, 86_400))[0]
    assert len(quiet.requests) == pytest.approx(0.2 * 86_400, rel=0.05)
    assert hours[11:13].sum() > 4 * (hours[0] + hours[-1])
    first, again = (bursty(3, hours=1.0).trace("bursty", 3) for _ in range(2))
    assert first == again
    assert first != bursty(4, hours=1.0).trace("bursty", 4)
    assert len(first.requests) >= 0.9 * 3.0 * 3600
