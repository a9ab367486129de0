"""``bench routing --live``: the same traces by a real cluster and by the simulator.

A fresh cluster for each policy: HAProxy, an API key, one router, replicas of the simulated engine.
The replay is over HTTP with streams; the simulator has the same trace and configuration. Steps
take 50 ms and prefills up to seconds, so what the machine adds is small beside them.
"""

import argparse
import asyncio
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.routing.live_cluster import REPLICAS, ROUTER, Live, cluster, generator, slug
from benchmarks.routing.replay import Replay
from benchmarks.routing.traces import ORACLE, POLICIES, Found, over_traces, ratio
from benchmarks.stream.paths import say
from cluster.admission.fair_queue import QueueLimits
from cluster.config import parse
from cluster.simulation.requests import Trace
from cluster.simulation.settings import Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load

RATES: Mapping[str, float] = {"few-shot": 5.0, "chat": 5.0, "hot-prefix": 3.0}
"""Requests/s for all replicas."""
NAMES = tuple(name for name in POLICIES if name != ORACLE)
"""No router can know every cache."""
HEADLINE, BASE = "prefix", "round-robin"
SEEDS = 9
"""Of the policy in the simulator, whose median counts: equals are told apart by chance."""
SHOWN = ("ttft_p50_s", "ttft_p90_s", "hit_rate", "max_over_mean_load")

LIVE, SIMULATED = "live", "simulated"
Findings = Mapping[tuple[str, str, str], list[Found]]
"""Of each trace, policy, and one of these two: the numbers of every round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    traces = ", ".join(RATES)
    parser.add_argument(
        "--live",
        nargs="*",
        choices=RATES,
        metavar="TRACE",
        help=f"a live cluster beside the simulator, and nothing else; {traces} (else the first)",
    )
    parser.add_argument("--live-s", type=float, default=60.0, help="length of each such trace")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"of --live: {'; '.join(NAMES)}",
    )


def run(args: argparse.Namespace) -> Report:
    """Each policy in a cluster of its own; each round has other seeds."""
    if args.quick:
        args.live_s = min(args.live_s, 15.0)
    args.live = args.live or list(RATES)[:1]
    found: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for seed, policy in interleaved(args.policies, args.rounds):
        with cluster(policy) as live:
            for name in args.live:
                trace = made(name, args.live_s, seed)
                for where, seen in (
                    (LIVE, served(live, trace)),
                    (SIMULATED, foretold(policy, trace)),
                ):
                    found[name, policy, where].append(seen)
                    say(seed, f"{name}, {policy}, {where}", _text(seen))
    return report(found, args)


def made(name: str, duration_s: float, seed: int) -> Trace:
    """A trace whose prompts hold no answers: a replay cannot know what it will be answered."""
    trace = load(name, RATES[name], duration_s, seed)
    return replace(trace, requests=[replace(r, answer_blocks=()) for r in trace.requests])


def served(live: Live, trace: Trace) -> Found:
    """What a cluster makes of a trace."""
    replay = Replay(live.url, live.model, live.headers)
    asyncio.run(replay.run(trace))
    return {
        "ttft_p50_s": replay.ttft_s.percentile(50),
        "ttft_p90_s": replay.ttft_s.percentile(90),
        "late_s": replay.late_s,
        **of_log(live.logged(trace.name, len(trace.requests))),
    }


def of_log(lines: Iterable[Mapping[str, Any]]) -> Found:
    """Hits, and the load of the busiest replica over the mean, from lines of a request log."""
    ongoing_s: Counter[str] = Counter()
    cached = prompts = 0
    for line in lines:
        ongoing_s[line["replica"]] += line["total_s"] - line["queue_s"]
        cached += line["cached_tokens"]
        prompts += line["prompt_tokens"]
    return {
        "hit_rate": cached / prompts,
        "max_over_mean_load": max(ongoing_s.values()) * REPLICAS / ongoing_s.total(),
    }


def foretold(policy: str, trace: Trace) -> Found:
    """What the simulator makes of it: the medians over seeds of the policy."""
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
    runs = [simulate(trace, replace(settings, seed=seed)).summary(0.0) for seed in range(SEEDS)]
    return {name: statistics.median(run[name] for run in runs) for name in SHOWN}


def report(found: Findings, args: argparse.Namespace) -> Report:
    """Ratios are taken in each round; over several traces they are geometric means."""

    def over(ours: tuple[str, str], other: tuple[str, str], key: str) -> Summary:
        """One policy, live or simulated, over another."""
        of = {t: ratio(found[t, *ours], found[t, *other], key) for t in args.live}
        return over_traces(of, statistics.geometric_mean)

    keys: dict[str, Summary] = {}
    for policy in args.policies:
        end = "" if policy == HEADLINE else f"_{slug(policy)}"
        pair = (policy, LIVE), (policy, SIMULATED)
        keys[f"live_over_simulated_ttft_p50{end}"] = over(*pair, "ttft_p50_s")
        keys[f"live_over_simulated_ttft_p90{end}"] = over(*pair, "ttft_p90_s")
        keys[f"live_hit_rate_vs_simulated{end}"] = over(*pair, "hit_rate")
    if {HEADLINE, BASE} <= set(args.policies):
        for where in (LIVE, SIMULATED):
            name = f"{where}_ttft_p90_prefix_vs_round_robin"
            keys[name] = over((HEADLINE, where), (BASE, where), "ttft_p90_s")
    return Report(
        keys=keys,
        tables=[_table(found, trace, args) for trace in args.live],
        details={"found": {" | ".join(key): rounds for key, rounds in found.items()}},
        notes=[
            f"{REPLICAS} replicas, one router, {args.live_s:g} s of each trace, from cold caches; "
            f"of the simulator the medians of {SEEDS} seeds of the policy",
            "load: the mean over time of a replica's ongoing requests, the busiest over the mean",
            "late: by how much the client sent a request too late at worst; above some 0.1 s the "
            "machine was busy with other things",
        ],
    )


def _table(found: Findings, trace: str, args: argparse.Namespace) -> Table:
    rows: list[list[Cell]] = []
    for policy in args.policies:
        live, simulated = found[trace, policy, LIVE], found[trace, policy, SIMULATED]
        row: list[Cell] = [policy]
        for key in SHOWN:
            row += [Summary(tuple(f[key] for f in side)) for side in (live, simulated)]
        rows.append([*row, Summary(tuple(f["late_s"] for f in live))])
    names = ("TTFT p50 s", "TTFT p90 s", "hits", "load")
    columns = ["policy", *(text for name in names for text in (name, "simulated")), "late s"]
    return Table(f"{trace}, {RATES[trace]:g} requests/s, live and simulated", columns, rows)


def _text(found: Found) -> str:
    return (
        f"hits {found['hit_rate']:.3f}, TTFT {found['ttft_p50_s']:.3f} and "
        f"{found['ttft_p90_s']:.3f} s, load {found['max_over_mean_load']:.2f}"
    )
