"""Part 2 of ``bench scale``: the routing policies on many replicas, in the simulator."""

import argparse
import time
from collections import defaultdict

from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.routing.decisions import POLICIES
from cluster.routing import make_policy
from cluster.simulation.requests import Outcome
from cluster.simulation.result import Result
from cluster.simulation.settings import LARGE_GPU, MakePolicy, Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

WARM_SHARE = 0.3
"""Share of the simulated time at the start that does not count, while caches fill."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, default=1000, help="simulated replicas")
    parser.add_argument("--routers", type=int, default=4, help="simulated routers")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="simulated requests/s of each replica"
    )
    parser.add_argument("--simulated-s", type=float, default=30.0, help="simulated seconds")
    parser.add_argument("--trace", default="conversation", help="see `tandem simulate`")


def run(args: argparse.Namespace) -> Report:
    """Simulate every policy in every round, each round with another seed."""
    if args.quick:
        args.replicas, args.simulated_s = min(args.replicas, 50), min(args.simulated_s, 10.0)
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for number, name in interleave(POLICIES, args.rounds):
        trace = load_trace(args.trace, args.rate * args.replicas, args.simulated_s, number)
        settings = Settings(
            engine=LARGE_GPU,
            replicas=args.replicas,
            policy=_factory(name),
            routers=args.routers,
            seed=number,
        )
        began = time.process_time()
        result = simulate(trace, settings)
        cpu_us = (time.process_time() - began) / max(1, len(trace.requests)) * 1e6
        rows[name].append((*_measure(result, args.simulated_s), cpu_us))
        print_progress(number, name, f"p90 {rows[name][-1][2] * 1e3:.0f} ms")
    return _report(rows, args)


def _factory(name: str) -> MakePolicy:
    return lambda index, _truth, seed: make_policy(name, index, seed)


def _measure(result: Result, simulated_s: float) -> tuple[float, ...]:
    """Return hit rate, TTFT p50 and p90, the busiest replica by the mean, and the failed share."""
    counted = [r for r in result.requests if r.spec.arrival_s >= WARM_SHARE * simulated_s]
    done = [r for r in counted if r.outcome is Outcome.DONE]
    ttfts = [r.ttft_s for r in done if r.ttft_s is not None] or [float("nan")]
    prompt = sum(r.spec.prompt_tokens for r in done) or 1
    work = [replica.work_s for replica in result.replicas]
    return (
        sum(r.cached_tokens for r in done) / prompt,
        percentile(ttfts, 50),
        percentile(ttfts, 90),
        max(work) / (sum(work) / len(work)) if any(work) else float("nan"),
        1 - len(done) / max(1, len(counted)),
    )


def _report(rows: dict[str, list[tuple[float, ...]]], args: argparse.Namespace) -> Report:
    columns = {n: [Summary(column) for column in zip(*r, strict=True)] for n, r in rows.items()}
    keys = {f"simulated_hit_rate_{name}": found[0] for name, found in columns.items()}
    keys |= {f"simulated_ttft_p90_s_{name}": found[2] for name, found in columns.items()}
    titles = ("policy", "hit rate", "TTFT p50 s", "p90 s", "busiest / mean", "failed", "CPU µs")
    title = (
        f"{args.replicas:,} simulated replicas, {args.routers} routers, "
        f"{args.rate * args.replicas:,.0f} requests/s of `{args.trace}`"
    )
    return Report(
        keys=keys,
        tables=[Table(title, titles, [(name, *found) for name, found in columns.items()])],
        details={"simulated": dict(rows)},
        notes=[
            f"{args.simulated_s:g} simulated seconds, of which the first {WARM_SHARE:.0%} fill the "
            "caches and do not count. CPU µs: of the whole simulation, per request."
        ],
    )
