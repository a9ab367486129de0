"""Replica-hours and SLO attainment of autoscaling, compared with Ray Serve's, in simulated time.

One pool (``cluster.simulation``) serves a day and twelve hours with bursts. Ray's policy and an
oracle are tuned on the very trace that they serve: of the settings that serve 99 % of the requests
within the SLO, the cheapest is compared with ours. No cluster is started.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.autoscale.policies import OraclePolicy, RayPolicy, RaySettings, work_rates
from benchmarks.autoscale.traces import bursty, daily
from benchmarks.report import CellValue, Report, Table
from benchmarks.rounds import Summary
from cluster.autoscaling import Autoscaler, Decision, PoolSignals, PoolSpec
from cluster.config import SimConfig
from cluster.routing import make_policy
from cluster.simulation.requests import Trace
from cluster.simulation.result import Result
from cluster.simulation.settings import LARGE_GPU, Scaling, ScalingPolicy, Settings, Slo
from cluster.simulation.simulator import simulate

MIN_ATTAINMENT = 0.99
REQUEST_SLO = Slo(ttft_s=4.0, itl_s=0.2)
"""SLO by which each request is judged."""
P90_SLO = Slo(ttft_s=2.0, itl_s=0.2)
"""SLO that our policy is configured with, for 90 % of the requests; the default configuration's."""
SPEC = PoolSpec(min=1, max=64, target_in_flight=8, upscale_delay_s=2, downscale_delay_s=120)
"""Our pool; the delays are the default configuration's."""
TARGETS = tuple(float(target) for target in range(2, 25))
DELAYS = ((30.0, 600.0), (30.0, 120.0), (0.0, 120.0))
"""Upscale and downscale delays of Ray's policy: Serve's defaults; our downscale delay; no upscale
delay either."""
LOADS = tuple(percent / 100 for percent in range(40, 101, 2))
"""Share of its time that a replica of the oracle is busy."""
SEED = 1000
"""Seed of the first round. Our policy was tuned on smaller seeds."""


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """Simulation of one policy on one trace."""

    label: str
    result: Result

    @property
    def attainment(self) -> float:
        """Share of the requests within the SLO."""
        return self.result.slo_attainment

    @property
    def hours(self) -> float:
        """Replica-hours, start-up included."""
        return self.result.replica_hours

    @property
    def order(self) -> tuple[bool, float]:
        """Sort key: first the cheapest with enough attainment, then the highest attainment."""
        enough = self.attainment >= MIN_ATTAINMENT
        return not enough, self.hours if enough else -self.attainment

    def as_row(self, trace: Trace) -> Sequence[CellValue]:
        counts = float(len(self.result.scale_events)), float(len(trace.requests))
        return (trace.name, self.label, f"{self.attainment:.4f}", self.hours, *counts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--startup", type=float, default=60.0, help="start-up time of a replica in seconds"
    )


def run(args: argparse.Namespace) -> Report:
    """Simulate; each round has other seeds for arrivals and bursts."""
    engine = LARGE_GPU.model_copy(update={"startup_s": args.startup})
    names = ("bursty",) if args.quick else ("daily", "bursty")
    rounds: list[dict[str, tuple[PolicyRun, PolicyRun, PolicyRun]]] = []
    rows: list[Sequence[CellValue]] = []
    for seed in range(SEED, SEED + args.rounds):
        rounds.append({})
        for name in names:
            curve = daily() if name == "daily" else bursty(seed, 0.5 if args.quick else 12.0)
            trace = curve.make_trace(name, seed)
            runs = _run_ours(trace, engine), best_of_ray(trace, engine), best_oracle(trace, engine)
            rounds[-1][name] = runs
            rows += [one.as_row(trace) for one in runs]
    return _report(rounds, rows)


def _report(
    rounds: Sequence[dict[str, tuple[PolicyRun, PolicyRun, PolicyRun]]],
    rows: list[Sequence[CellValue]],
) -> Report:
    def worst(join: Callable[[Sequence[float]], float], value: Callable[..., float]) -> Summary:
        return Summary(tuple(join([value(*runs) for runs in each.values()]) for each in rounds))

    keys = {
        "slo_attainment": worst(min, lambda ours, _ray, _oracle: ours.attainment),
        "replica_hours_vs_ray": worst(max, lambda ours, ray, _oracle: ours.hours / ray.hours),
        "oracle_hours_vs_ray": worst(max, lambda _ours, ray, oracle: oracle.hours / ray.hours),
    }
    goals = {"slo_attainment": f">= {MIN_ATTAINMENT}", "replica_hours_vs_ray": "<= 0.8"}
    columns = ("trace", "policy", "within SLO", "replica-hours", "scalings", "requests")
    notes = [
        f"SLO of a request: TTFT of at most {REQUEST_SLO.ttft_s:g} s, mean ITL of at most"
        f" {1000 * REQUEST_SLO.itl_s:g} ms.",
        f"Our policy is configured with a p90 TTFT of {P90_SLO.ttft_s:g} s. For Ray's policy, the"
        " target and the delays are swept; for the oracle, the load.",
        "Each key is that of the worse trace.",
    ]
    return Report(keys, goals, [Table("Autoscaling in simulated time", columns, rows)], notes=notes)


def _run_ours(trace: Trace, engine: SimConfig) -> PolicyRun:
    autoscaler = Autoscaler({"pool": SPEC})

    def decide(now: float, signals: PoolSignals) -> Decision:
        return autoscaler.decide(now, {"pool": signals})["pool"]

    return PolicyRun("Tandem", simulate_policy(trace, engine, decide))


def best_of_ray(trace: Trace, engine: SimConfig) -> PolicyRun:
    """Run Ray's policy with the best of all targets and delays."""

    def run_with(up_s: float, down_s: float, target: float) -> PolicyRun:
        policy = RayPolicy(RaySettings(target, up_s, down_s), SPEC.min, SPEC.max)
        label = f"Ray: target {target:g}, +{up_s:g} s, -{down_s:g} s"
        return PolicyRun(label, simulate_policy(trace, engine, policy.decide))

    best = [bisect_highest(TARGETS, partial(run_with, *delays)) for delays in DELAYS]
    return min(best, key=lambda one: one.order)


def best_oracle(trace: Trace, engine: SimConfig) -> PolicyRun:
    """Run the oracle with the best load of a replica."""
    rates = work_rates(trace, engine)

    def run_with(load: float) -> PolicyRun:
        policy = OraclePolicy(rates, load, engine.startup_s)
        return PolicyRun(f"Oracle: {load:.0%} busy", simulate_policy(trace, engine, policy.decide))

    return bisect_highest(LOADS, run_with)


def bisect_highest(values: Sequence[float], run_with: Callable[[float], PolicyRun]) -> PolicyRun:
    """Return the run of the highest of sorted ``values`` with enough attainment.

    Higher values must cost less and attain less. If none attains enough, return the run of the
    lowest.
    """
    best, low, high = run_with(values[0]), 1, len(values)
    while low < high and best.attainment >= MIN_ATTAINMENT:
        middle = (low + high) // 2
        found = run_with(values[middle])
        if found.attainment >= MIN_ATTAINMENT:
            best, low = min(best, found, key=lambda one: one.order), middle + 1
        else:
            high = middle
    return best


def simulate_policy(trace: Trace, engine: SimConfig, policy: ScalingPolicy) -> Result:
    """Simulate a trace with a scaling policy, from two replicas."""
    settings = Settings(
        engine,
        replicas=2,
        policy=lambda index, _truth, seed: make_policy("least-load", index, seed),
        scaling=Scaling(policy, P90_SLO),
        slo=REQUEST_SLO,
    )
    return simulate(trace, settings)
