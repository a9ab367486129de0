"""Simulated pools: every request ends once, runs are reproducible, faults, scaling."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.admission.fair_queue import QueueLimits
from cluster.autoscaling import Decision, PoolSignals
from cluster.cli.app import app
from cluster.config import SimConfig
from cluster.errors import ConfigError
from cluster.routing import make_policy
from cluster.simulation.requests import Outcome, Trace, TraceRequest
from cluster.simulation.result import Result
from cluster.simulation.settings import Fault, MakePolicy, Scaling, Settings, Slo
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

ENGINE = SimConfig(
    prefill_s_per_token=1e-4,
    decode_s_per_token=0.01,
    batch_slowdown=0.02,
    num_kv_blocks=4000,
    startup_s=20,
)


def policy(name: str) -> MakePolicy:
    return lambda index, _truth, seed: make_policy(name, index, seed)


def settings(**more: Any) -> Settings:
    return replace(Settings(ENGINE, replicas=4, policy=policy("prefix")), **more)


def decision_for(target: int) -> Decision:
    return Decision(target, target, "test", f"the test wants {target}")


def chat(rate: float = 8.0, duration_s: float = 120.0, seed: int = 0) -> Trace:
    return load_trace("chat", rate, duration_s, seed)


def outcomes(result: Result) -> dict[str, int]:
    return {each.value: result.count(each) for each in Outcome if result.count(each)}


def check(result: Result, trace: Trace) -> None:
    """Check what holds for every simulation."""
    assert sum(outcomes(result).values()) == len(trace.requests)
    for call in result.requests:
        done = call.outcome is Outcome.DONE
        assert (call.ended_s is not None) == done
        if done:
            assert call.first_token_s is not None
            assert call.spec.arrival_s <= call.first_token_s <= (call.ended_s or 0)
            assert 0 <= call.cached_tokens < call.spec.prompt_tokens


@pytest.mark.parametrize("name", ["prefix", "least-load", "session", "power-of-two", "round-robin"])
def test_every_request_ends_once(name: str) -> None:
    trace = chat()
    result = simulate(trace, settings(policy=policy(name), routers=2))
    check(result, trace)
    assert outcomes(result) == {"done": len(trace.requests)}
    assert 0 < result.hit_rate < 1
    tokens = sum(request.completion_tokens - 1 for request in trace.requests)
    assert result.itl_s.weight == tokens


def test_the_same_seed_gives_the_same_result() -> None:
    faults = (Fault(40, 1, "die"),)
    first, again = (simulate(chat(), settings(routers=2, faults=faults)) for _ in range(2))
    assert first.summary(1.0) == again.summary(1.0)
    assert [c.first_token_s for c in first.requests] == [c.first_token_s for c in again.requests]
    other = simulate(chat(seed=1), settings(routers=2, faults=faults))
    assert other.summary(1.0) != first.summary(1.0)


@pytest.mark.parametrize("kind", ["die", "hang"])
def test_a_lost_replica_is_replaced_and_few_requests_fail(kind: str) -> None:
    trace = chat()
    fault = Fault(40, 1, kind)  # type: ignore[arg-type]
    result = simulate(trace, settings(faults=(fault,), detect_s=10))
    check(result, trace)
    failed = result.count(Outcome.FAILED)
    assert 0 < failed < 0.1 * len(trace.requests)  # streams that had begun
    assert failed + result.count(Outcome.DONE) == len(trace.requests)
    assert len(result.replicas) == 5


def test_a_slow_replica_gets_less_work() -> None:
    result = simulate(chat(duration_s=300), settings(faults=(Fault(0, 2, "slow"),)))
    work = {replica.id: replica.work_s for replica in result.replicas}
    assert work.pop("r0002") < 0.5 * min(work.values())
    assert result.count(Outcome.DONE) == len(result.requests)


@pytest.mark.parametrize("routers", [1, 3])
def test_without_replicas_requests_time_out_or_are_shed(routers: int) -> None:
    trace = chat(duration_s=20)
    queue = QueueLimits(float("inf"), 10)
    result = simulate(trace, settings(replicas=0, routers=routers, queue=queue, queue_timeout_s=5))
    check(result, trace)
    assert set(outcomes(result)) == {"late", "shed"}
    assert result.slo_attainment == 0


def test_requests_wait_for_the_first_replica_of_a_pool_at_zero() -> None:
    trace = chat(duration_s=20)
    timeouts = {"queue_timeout_s": 5, "start_timeout_s": 60}
    scaling = Scaling(lambda _now_s, _signals: decision_for(1))
    result = simulate(trace, settings(replicas=0, scaling=scaling, **timeouts))
    check(result, trace)
    assert set(outcomes(result)) == {"done"}


def test_a_request_larger_than_the_kv_cache_fails() -> None:
    huge = TraceRequest(0.0, 10**6, 5)
    result = simulate(Trace("huge", [huge], 64), settings())
    assert outcomes(result) == {"failed": 1}


def test_an_empty_trace_gives_an_empty_result() -> None:
    result = simulate(Trace("empty", [], 64), settings())
    assert result.summary(1.0)["requests"] == 0


def test_replicas_start_and_drain_without_losing_requests() -> None:
    seen: list[PoolSignals] = []

    def decide(now_s: float, signals: PoolSignals) -> Decision:
        seen.append(signals)
        return decision_for(6 if 30 <= now_s < 80 else 2)

    trace = chat(duration_s=150)
    result = simulate(trace, settings(replicas=2, scaling=Scaling(decide)))
    check(result, trace)
    assert outcomes(result) == {"done": len(trace.requests)}
    events = [(e.before, e.after, e.reason) for e in result.scale_events]
    assert events == [(2, 6, "the test wants 6"), (6, 2, "the test wants 2")]
    ready = {round(sample.at_s): sample.ready for sample in result.samples}
    assert ready[45] == 2
    assert ready[55] == 6
    assert ready[100] == 2
    assert all(signals.is_plausible for signals in seen)
    rates = [signals.requests_per_s for signals in seen[5:70]]
    assert sum(rates) / len(rates) == pytest.approx(len(trace.requests) / 150, rel=0.3)
    busy = seen[50]
    assert busy.prefill_per_s > 0
    assert all(objective.samples > 0 for objective in busy.objectives)
    lived = [replica.lived_s for replica in result.replicas]
    assert sum(50 <= seconds < 110 for seconds in lived) == 4  # they drain


def test_itl_percentiles_are_weighted_by_tokens_not_by_time() -> None:
    """A long prefill delays few tokens: half of the time, but a small part of the gaps."""
    observed_s: list[float] = []

    def decide(_now_s: float, signals: PoolSignals) -> Decision:
        observed_s.extend(o.observed_s for o in signals.objectives if o.name == "itl_p90_s")
        return decision_for(1)

    long = [TraceRequest(at * 0.471, 2000, 100) for at in range(400)]
    engine = ENGINE.model_copy(update={"prefill_s_per_token": 1.25e-4})
    one = settings(engine=engine, replicas=1, scaling=Scaling(decide))
    result = simulate(Trace("long", long, 64), one)
    assert result.itl_s.percentile(99) > 10 * result.itl_s.percentile(90)
    settled = sorted(observed_s[20:100])
    assert settled[len(settled) // 2] == pytest.approx(result.itl_s.percentile(90), rel=0.1)


def test_queued_requests_are_served_after_scaling_from_zero() -> None:
    trace = chat(duration_s=60)
    scaling = Scaling(lambda _now_s, seen: decision_for(3 if seen.queued or seen.in_flight else 0))
    result = simulate(trace, settings(replicas=0, scaling=scaling))
    assert outcomes(result) == {"done": len(trace.requests)}


def test_late_reports_lose_no_requests() -> None:
    trace = chat(rate=20.0)
    fresh, stale = (
        simulate(trace, settings(routers=3, report_s=report, event_delay_s=delay))
        for report, delay in ((0.1, 0.01), (30.0, 30.0))
    )
    check(stale, trace)
    assert stale.count(Outcome.DONE) == fresh.count(Outcome.DONE) == len(trace.requests)
    assert stale.hit_rate <= fresh.hit_rate + 0.02


def test_objectives_apply_to_each_request() -> None:
    trace = chat()
    seen: list[PoolSignals] = []

    def decide(_now_s: float, signals: PoolSignals) -> Decision:
        seen.append(signals)
        return decision_for(4)

    simulate(trace, settings(slo=Slo(ttft_s=3.0, itl_s=math.inf), scaling=Scaling(decide)))
    assert {tuple((o.name, o.limit_s) for o in s.objectives) for s in seen} == {
        (("ttft_p90_s", 3.0),)
    }
    strict = simulate(trace, settings(slo=Slo(ttft_s=1e-3)))
    easy = simulate(trace, settings(slo=Slo(ttft_s=1e3, itl_s=1e3)))
    assert (strict.slo_attainment, easy.slo_attainment) == (0.0, 1.0)


CONFIG = """
applications:
- name: tandem
  import_path: deployments.app:build
  args:
    generators:
    - name: gen
      model: m
      engine: sim
      resources: {cpus: 2, gpus: 1}
      slo: {ttft_p90_s: 1.5}
      replicas: {min: 1, max: 8, target_in_flight: 16}
    router: {replicas: {min: 1, max: 1}, resources: {cpus: 1}}
    budget: {cpus: 5}
    accounting: {per_cpu_hour: 0.1, per_gpu_hour: 2, currency: CHF}
"""


CAUSES = {"forecast", "in_flight", "learning", "missed", "kv", "limit", "busy", "budget"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_the_command_prints_json_and_draws_a_plot(tmp_path: Path, config: str) -> None:
    picture = tmp_path / "picture.png"
    args = ["simulate", "--trace", "bursty", "--duration-s", "200", "--rate", "3", "--json"]
    done = CliRunner().invoke(app, [*args, "--config", config, "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["requests"] == found["done"] > 100
    assert {"slo_attainment", "ttft_p90_s"} <= found.keys()
    assert found["cost"] == pytest.approx(2.2 * found["replica_hours"])
    assert len(found["scaled"]) == found["scale_events"] > 0
    assert {event["cause"] for event in found["scaled"]} <= CAUSES
    assert all(event["reason"] for event in found["scaled"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_respects_the_budget_of_all_pools(config: str) -> None:
    args = ["simulate", "--trace", "chat", "--duration-s", "200", "--rate", "40"]
    done = CliRunner().invoke(app, [*args, "--config", config])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    (change,) = [line for line in lines if "replicas (" in line]
    assert "from 1 to 2 replicas (budget): " in change, "the router uses 1 of the 5 CPUs"
    (cost,) = [line.split() for line in lines if line.startswith(" cost")]
    assert cost[2] == "CHF"


@pytest.mark.parametrize(
    ("more", "attained"),
    [
        ([], True),
        (["--set", "generators.gen.slo.ttft_p90_s=0.0001"], False),
        (["--set", "generators.gen.slo.ttft_p90_s=0.0001", "--ttft-s", "100"], True),
        (["--set", "generators.gen.slo.ttft_p90_s=null"], True),
        (["--itl-s", "0.0001"], False),
    ],
)
def test_the_pools_objectives_are_the_default(config: str, more: list[str], attained: bool) -> None:
    args = ["simulate", "--trace", "rag", "--duration-s", "10", "--replicas", "8", "--json"]
    done = CliRunner().invoke(app, [*args, "--config", config, *more])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["slo_attainment"] == (1.0 if attained else 0.0)


def test_the_command_prints_a_table(config: str) -> None:
    args = ["simulate", "--trace", "rag", "--duration-s", "30", "--replicas", "2"]
    done = CliRunner().invoke(app, [*args, "--config", config, "--fault", "die:0@10"])
    assert done.exit_code == 0, done.output
    assert "slo_attainment" in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "best"], "'best'"),
        (["--pool", "other"], "allowed: gen"),
        (["--fault", "melt:1@2"], "melt:1@2"),
    ],
)
def test_invalid_options_are_named(config: str, more: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["simulate", "--trace", "rag", "--config", config, *more])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
