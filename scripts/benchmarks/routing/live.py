"""``bench routing --live``: the same traces on a real cluster and in the simulator.

Each policy gets a new cluster: HAProxy, an API key, one router, replicas of the simulated engine.
Requests are streamed over HTTP; the simulator has the same trace and configuration. Engine steps
take 50 ms and prefills up to seconds, so the machine's own latency is small in comparison.
"""

import argparse
import asyncio
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.routing.live_cluster import (
    REPLICAS,
    ROUTER,
    LiveCluster,
    generator,
    live_cluster,
    slug,
)
from benchmarks.routing.replay import Replay
from benchmarks.routing.traces import ORACLE, POLICIES, TraceResult, over_traces, ratio
from cluster.admission.fair_queue import QueueLimits
from cluster.config import parse
from cluster.simulation.requests import Trace
from cluster.simulation.settings import Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

RATES: Mapping[str, float] = {"few-shot": 5.0, "chat": 5.0, "hot-prefix": 3.0}
"""Requests/s for all replicas."""
LIVE_POLICIES = tuple(name for name in POLICIES if name != ORACLE)
"""All policies but the oracle: no router knows every cache."""
HEADLINE, BASELINE = "prefix", "round-robin"
NUM_SEEDS = 9
"""Seeds of the policy in the simulator; the median counts, because ties are broken at random."""
COMPARED = ("ttft_p50_s", "ttft_p90_s", "hit_rate", "max_over_mean_load")

LIVE, SIMULATED = "live", "simulated"
LiveResults = Mapping[tuple[str, str, str], list[TraceResult]]
"""Numbers of each round, by trace, policy, and LIVE or SIMULATED."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces = ", ".join(RATES)
    parser.add_argument(
        "--live",
        nargs="*",
        choices=RATES,
        metavar="TRACE",
        help=f"only compare a live cluster with the simulator; {traces} (default: the first)",
    )
    parser.add_argument(
        "--live-s", type=float, default=60.0, help="duration of each trace of --live"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=LIVE_POLICIES,
        default=list(LIVE_POLICIES),
        metavar="NAME",
        help=f"policies of --live: {'; '.join(LIVE_POLICIES)}",
    )


def run(args: argparse.Namespace) -> Report:
    """Run each policy on a new cluster; each round has other seeds."""
    if args.quick:
        args.live_s = min(args.live_s, 15.0)
    args.live = args.live or list(RATES)[:1]
    results: dict[tuple[str, str, str], list[TraceResult]] = defaultdict(list)
    for seed, policy in interleave(args.policies, args.rounds):
        with live_cluster(policy) as live:
            for name in args.live:
                trace = make_trace(name, args.live_s, seed)
                for where, result in (
                    (LIVE, replay_live(live, trace)),
                    (SIMULATED, simulate_same(policy, trace)),
                ):
                    results[name, policy, where].append(result)
                    print_progress(seed, f"{name}, {policy}, {where}", _text(result))
    return make_report(results, args)


def make_trace(name: str, duration_s: float, seed: int) -> Trace:
    """Return a trace whose prompts contain no completions, since a replay cannot know them."""
    trace = load_trace(name, RATES[name], duration_s, seed)
    return replace(trace, requests=[replace(r, answer_blocks=()) for r in trace.requests])


def replay_live(live: LiveCluster, trace: Trace) -> TraceResult:
    """Replay a trace on a cluster and return the numbers."""
    replay = Replay(live.url, live.model, live.headers)
    asyncio.run(replay.run(trace))
    return {
        "ttft_p50_s": replay.ttft_s.percentile(50),
        "ttft_p90_s": replay.ttft_s.percentile(90),
        "late_s": replay.late_s,
        **summarize_log(live.read_log(trace.name, len(trace.requests))),
    }


def summarize_log(lines: Iterable[Mapping[str, Any]]) -> TraceResult:
    """Return the hit rate and the busiest replica's load over the mean, from a request log."""
    in_flight_s: Counter[str] = Counter()
    cached = prompts = 0
    for line in lines:
        in_flight_s[line["replica"]] += line["total_s"] - line["queue_s"]
        cached += line["cached_tokens"]
        prompts += line["prompt_tokens"]
    return {
        "hit_rate": cached / prompts,
        "max_over_mean_load": max(in_flight_s.values()) * REPLICAS / in_flight_s.total(),
    }


def simulate_same(policy: str, trace: Trace) -> TraceResult:
    """Simulate the trace and return the medians over the seeds of the policy."""
    config = parse({"generators": [generator()], "router": ROUTER})
    (pool,), router = config.generators, config.router
    settings = Settings(
        engine=pool.sim,
        replicas=REPLICAS,
        policy=POLICIES[policy],
        max_in_flight=pool.max_in_flight,
        queue=QueueLimits(router.max_queued_tokens, router.max_queued),
        queue_timeout_s=router.queue_timeout_s,
    )
    runs = [simulate(trace, replace(settings, seed=seed)).summary(0.0) for seed in range(NUM_SEEDS)]
    return {name: statistics.median(run[name] for run in runs) for name in COMPARED}


def make_report(results: LiveResults, args: argparse.Namespace) -> Report:
    """Return ratios per round; over several traces, their geometric means."""

    def over(ours: tuple[str, str], other: tuple[str, str], key: str) -> Summary:
        by_trace = {t: ratio(results[t, *ours], results[t, *other], key) for t in args.live}
        return over_traces(by_trace, statistics.geometric_mean)

    keys: dict[str, Summary] = {}
    for policy in args.policies:
        end = "" if policy == HEADLINE else f"_{slug(policy)}"
        pair = (policy, LIVE), (policy, SIMULATED)
        keys[f"live_over_simulated_ttft_p50{end}"] = over(*pair, "ttft_p50_s")
        keys[f"live_over_simulated_ttft_p90{end}"] = over(*pair, "ttft_p90_s")
        keys[f"live_hit_rate_vs_simulated{end}"] = over(*pair, "hit_rate")
    if {HEADLINE, BASELINE} <= set(args.policies):
        for where in (LIVE, SIMULATED):
            name = f"{where}_ttft_p90_prefix_vs_round_robin"
            keys[name] = over((HEADLINE, where), (BASELINE, where), "ttft_p90_s")
    return Report(
        keys=keys,
        tables=[_table(results, trace, args) for trace in args.live],
        details={"found": {" | ".join(key): rounds for key, rounds in results.items()}},
        notes=[
            f"{REPLICAS} replicas, one router, {args.live_s:g} s of each trace, from cold caches. "
            f"Simulated numbers are medians over {NUM_SEEDS} seeds of the policy.",
            "Load: mean number of requests in flight over time, busiest replica over the mean.",
            "Late: largest delay of the client in sending a request. Above about 0.1 s, the "
            "machine was busy with other work.",
        ],
    )


def _table(results: LiveResults, trace: str, args: argparse.Namespace) -> Table:
    rows: list[list[CellValue]] = []
    for policy in args.policies:
        live, simulated = results[trace, policy, LIVE], results[trace, policy, SIMULATED]
        row: list[CellValue] = [policy]
        for key in COMPARED:
            row += [Summary(tuple(f[key] for f in side)) for side in (live, simulated)]
        rows.append([*row, Summary(tuple(f["late_s"] for f in live))])
    names = ("TTFT p50 s", "TTFT p90 s", "hit rate", "load")
    columns = ["policy", *(text for name in names for text in (name, "simulated")), "late s"]
    return Table(f"{trace}, {RATES[trace]:g} requests/s, live and simulated", columns, rows)


def _text(result: TraceResult) -> str:
    return (
        f"hit rate {result['hit_rate']:.3f}, TTFT {result['ttft_p50_s']:.3f} and "
        f"{result['ttft_p90_s']:.3f} s, load {result['max_over_mean_load']:.2f}"
    )
