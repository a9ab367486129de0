"""Replica-hours and attained objectives of autoscaling, beside Ray's own, in simulated time.

A day and twelve hours with bursts are served by one pool (``cluster.simulation``). Ray's policy
and an oracle are tuned on the trace that they then serve: of those that serve 99 % of the requests
well, the cheapest is what ours is compared with. No cluster is started.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.autoscale.oracle import Oracle, work_rates
from benchmarks.autoscale.ray_policy import RayPolicy, RaySettings
from benchmarks.autoscale.traces import bursty, daily
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary
from cluster.autoscaling import Autoscaler, Decision, PoolSignals, PoolSpec
from cluster.config import SimConfig
from cluster.routing import make_policy
from cluster.simulation.requests import Trace
from cluster.simulation.result import Result
from cluster.simulation.settings import LARGE_GPU, Scaling, ScalingPolicy, Settings, Slo
from cluster.simulation.simulator import simulate

ATTAINMENT = 0.99
SERVED_WELL = Slo(ttft_s=4.0, itl_s=0.2)
"""Of each request."""
OBJECTIVES = Slo(ttft_s=2.0, itl_s=0.2)
"""What ours is told, each for nine tenths of the requests: the configuration's defaults."""
SPEC = PoolSpec(min=1, max=64, target_in_flight=8, upscale_delay_s=2, downscale_delay_s=120)
"""The delays are the configuration's defaults."""
TARGETS = tuple(float(target) for target in range(2, 25))
DELAYS = ((30.0, 600.0), (30.0, 120.0), (0.0, 120.0))
"""Serve's defaults (up, down), as fast down as ours, and as fast up too."""
LOADS = tuple(percent / 100 for percent in range(40, 101, 2))
"""The share of its time that a replica of the oracle is busy."""
SEED = 1000
"""Of the first round. Ours was tuned on seeds below it."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One policy on one trace."""

    label: str
    result: Result

    @property
    def attainment(self) -> float:
        """The share of requests that were served well."""
        return self.result.slo_attainment

    @property
    def hours(self) -> float:
        """Replica-hours from the moments at which starts were asked for."""
        return self.result.replica_hours

    @property
    def order(self) -> tuple[bool, float]:
        """The cheapest of those that attain enough is least; if none does, who attains most."""
        enough = self.attainment >= ATTAINMENT
        return not enough, self.hours if enough else -self.attainment

    def row(self, trace: Trace) -> Sequence[Cell]:
        """For the table."""
        cells = self.hours, float(len(self.result.scale_events)), float(len(trace.requests))
        return (trace.name, self.label, f"{self.attainment:.4f}", *cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench autoscale``."""
    parser.add_argument(
        "--startup", type=float, default=60.0, help="seconds until a replica answers"
    )


def run(args: argparse.Namespace) -> Report:
    """Simulate; each round has another seed of arrivals and of bursts."""
    engine = LARGE_GPU.model_copy(update={"startup_s": args.startup})
    names = ("bursty",) if args.quick else ("daily", "bursty")
    rounds: list[dict[str, tuple[Tried, Tried, Tried]]] = []
    rows: list[Sequence[Cell]] = []
    for seed in range(SEED, SEED + args.rounds):
        rounds.append({})
        for name in names:
            load = daily() if name == "daily" else bursty(seed, 0.5 if args.quick else 12.0)
            trace = load.trace(name, seed)
            found = _ours(trace, engine), best_of_ray(trace, engine), best_oracle(trace, engine)
            rounds[-1][name] = found
            rows += [tried.row(trace) for tried in found]
    return _report(rounds, rows)


def _report(
    rounds: Sequence[dict[str, tuple[Tried, Tried, Tried]]], rows: list[Sequence[Cell]]
) -> Report:
    def summary(of: Callable[[Sequence[float]], float], number: Callable[..., float]) -> Summary:
        return Summary(tuple(of([number(*found) for found in each.values()]) for each in rounds))

    keys = {
        "slo_attainment": summary(min, lambda ours, _ray, _oracle: ours.attainment),
        "replica_hours_vs_ray": summary(max, lambda ours, ray, _oracle: ours.hours / ray.hours),
        "oracle_hours_vs_ray": summary(max, lambda _ours, ray, oracle: oracle.hours / ray.hours),
    }
    goals = {"slo_attainment": f">= {ATTAINMENT}", "replica_hours_vs_ray": "<= 0.8"}
    columns = ("trace", "policy", "served well", "replica-hours", "changes", "requests")
    notes = [
        f"A request is served well if its first token comes within {SERVED_WELL.ttft_s:g} s and its"
        f" tokens within {1000 * SERVED_WELL.itl_s:g} ms of the mean.",
        f"Ours is told a p90 objective of {OBJECTIVES.ttft_s:g} s. The target and the delays of"
        " Ray's policy are swept, and so is the load of the oracle, which knows what comes.",
        "The keys are of the worse trace.",
    ]
    return Report(keys, goals, [Table("Autoscaling in simulated time", columns, rows)], notes=notes)


def _ours(trace: Trace, engine: SimConfig) -> Tried:
    autoscaler = Autoscaler({"pool": SPEC})

    def decide(now: float, signals: PoolSignals) -> Decision:
        return autoscaler.decide(now, {"pool": signals})["pool"]

    return Tried("Tandem", served(trace, engine, decide))


def best_of_ray(trace: Trace, engine: SimConfig) -> Tried:
    """Ray's policy with the best of all targets and delays."""

    def tried(up_s: float, down_s: float, target: float) -> Tried:
        policy = RayPolicy(RaySettings(target, up_s, down_s), SPEC.min, SPEC.max)
        label = f"Ray: {target:g} each, +{up_s:g} s, -{down_s:g} s"
        return Tried(label, served(trace, engine, policy.decide))

    swept = [highest(TARGETS, partial(tried, *delays)) for delays in DELAYS]
    return min(swept, key=lambda found: found.order)


def best_oracle(trace: Trace, engine: SimConfig) -> Tried:
    """The oracle with the best load of a replica."""
    rates = work_rates(trace, engine)

    def tried(load: float) -> Tried:
        policy = Oracle(rates, load, engine.startup_s)
        return Tried(f"Oracle: {load:.0%} busy", served(trace, engine, policy.decide))

    return highest(LOADS, tried)


def highest(values: Sequence[float], tried: Callable[[float], Tried]) -> Tried:
    """What comes of the highest of sorted ``values`` that attains enough, by bisection.

    What is higher costs less and attains less. If none attains enough: what comes of the least.
    """
    best, low, high = tried(values[0]), 1, len(values)
    while low < high and best.attainment >= ATTAINMENT:
        middle = (low + high) // 2
        found = tried(values[middle])
        if found.attainment >= ATTAINMENT:
            best, low = min(best, found, key=lambda one: one.order), middle + 1
        else:
            high = middle
    return best


def served(trace: Trace, engine: SimConfig, policy: ScalingPolicy) -> Result:
    """What comes of a trace with a policy; two replicas are there at the beginning."""
    settings = Settings(
        engine,
        replicas=2,
        policy=lambda index, _truth, seed: make_policy("least-load", index, seed),
        scaling=Scaling(policy, OBJECTIVES),
        slo=SERVED_WELL,
    )
    return simulate(trace, settings)
