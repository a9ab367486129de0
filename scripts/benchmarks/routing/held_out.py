"""Part 3 of ``bench routing``: our policy against tuned peers, on seeds that tuned no policy.

Peers with parameters run a training trace with each of several settings, and keep the one with the
smallest p90 TTFT, per trace. Seeds from ``FIRST_SEED`` then judge. Ours has its defaults.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import geometric_mean

from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.routing.peers import RayPrefixAffinity, VllmRouterCacheAware
from benchmarks.routing.traces import (
    PEERS,
    POLICIES,
    RATES,
    REPLICAS,
    TraceResult,
    over_traces,
    peer_policy,
)
from cluster.simulation.requests import Trace
from cluster.simulation.settings import LARGE_GPU, MakePolicy, Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

KEY = "ttft_p90_vs_best_peer_held_out"
GOAL = "<= 0.7"
TRAINING_SEED = 0
FIRST_SEED = 1000
"""First seed of the rounds; lower ones may have tuned a policy."""
MIN_DONE = 0.99
"""Share of the requests that a peer must finish for its latency to count."""


def _ray(limit: float) -> MakePolicy:
    return peer_policy(lambda seed: RayPrefixAffinity(seed, limit))


def _vllm_router(limit: int, ratio: float) -> MakePolicy:
    return peer_policy(lambda _: VllmRouterCacheAware(abs_threshold=limit, rel_threshold=ratio))


SETTINGS: Mapping[str, Mapping[str, MakePolicy]] = {
    # Its default never looks at load and fails on most traces.
    "ray prefix-aware": {f"imbalanced_threshold {n}": _ray(n) for n in (2, 5, 10, 20)},
    "vllm-router cache-aware": {
        f"abs_threshold {limit}, rel_threshold {ratio}": _vllm_router(limit, ratio)
        for limit, ratio in ((2, 1.1), (4, 1.1), (8, 1.2), (16, 1.5))
    },
}
"""Settings that are tried, by peer."""
UNTUNED = ("round-robin", "ray power-of-two")
"""Peers without parameters."""


def run(args: argparse.Namespace) -> Report:
    """Tune the peers, then run every trace with ours and theirs; each round has another seed."""
    chosen = {trace: _tune(trace, args.trace_s) for trace in args.traces}
    results: dict[tuple[str, str], list[TraceResult]] = defaultdict(list)
    for number in range(args.rounds):
        for trace in args.traces:
            requests = _load(trace, args.trace_s, FIRST_SEED + number)
            competitors = {"prefix": POLICIES["prefix"]}
            competitors |= {name: PEERS[name] for name in UNTUNED}
            competitors |= {peer: SETTINGS[peer][best] for peer, best in chosen[trace].items()}
            for name, make in competitors.items():
                summary = _simulate(requests, make, FIRST_SEED + number)
                results[trace, name].append(summary)
                print_progress(number, f"{trace}, {name}", f"p90 {summary['ttft_p90_s']:.3f} s")
    return _report(results, chosen, args)


def _load(trace: str, trace_s: float, seed: int) -> Trace:
    return load_trace(trace, RATES[trace], trace_s, seed)


def _simulate(requests: Trace, make: MakePolicy, seed: int) -> TraceResult:
    return simulate(requests, Settings(LARGE_GPU, REPLICAS, make, seed=seed)).summary(0.0)


def _tune(trace: str, trace_s: float) -> dict[str, str]:
    """Return the best setting of each peer on the training seed."""
    requests, best = _load(trace, trace_s, TRAINING_SEED), {}
    for peer, settings in SETTINGS.items():
        tried = {
            name: counted_s(_simulate(requests, make, TRAINING_SEED))
            for name, make in settings.items()
        }
        best[peer] = min(tried, key=tried.__getitem__)
        print_progress(-1, f"{trace}, {peer}", f"{best[peer]}: p90 {tried[best[peer]]:.3f} s")
    return best


def counted_s(result: TraceResult) -> float:
    """Return the p90 TTFT of a run; infinite if too few requests finished."""
    is_served = result["done"] >= MIN_DONE * result["requests"]
    return result["ttft_p90_s"] if is_served else math.inf


def _report(
    results: dict[tuple[str, str], list[TraceResult]],
    chosen: dict[str, dict[str, str]],
    args: argparse.Namespace,
) -> Report:
    peers = (*UNTUNED, *SETTINGS)
    ratios, rows = {}, []
    for trace in args.traces:
        ours, *theirs = (
            Summary(tuple(map(counted_s, results[trace, name]))) for name in ("prefix", *peers)
        )
        ratios[trace] = vs_best(ours, theirs)
        rows.append((trace, ours, *theirs, ratios[trace]))
    title = f"TTFT p90 s, seeds from {FIRST_SEED}"
    return Report(
        keys={
            KEY: over_traces(ratios, geometric_mean),
            **{f"{KEY}_{trace}": summary for trace, summary in ratios.items()},
        },
        goals={KEY: GOAL},
        tables=[Table(title, ("trace", "prefix", *peers, "prefix / best peer"), rows)],
        details={"tuned_peers": chosen},
        notes=[
            f"{REPLICAS} replicas, one router, {args.trace_s:g} s of each trace, from cold caches; "
            f"peers tuned on seed {TRAINING_SEED}, judged on seeds from {FIRST_SEED}.",
            *(f"{trace}: {_join(settings)}" for trace, settings in chosen.items()),
        ],
    )


def vs_best(ours: Summary, theirs: list[Summary]) -> Summary:
    """Return the ratio to the best peer of each round; NaN if no peer can serve the trace."""
    best = map(min, zip(*(each.rounds for each in theirs), strict=True))
    pairs = zip(ours.rounds, best, strict=True)
    return Summary(tuple(a / b if b < math.inf else math.nan for a, b in pairs))


def _join(settings: Mapping[str, str]) -> str:
    return "; ".join(f"{peer} with {setting}" for peer, setting in settings.items())
