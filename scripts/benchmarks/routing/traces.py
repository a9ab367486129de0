"""Part 2 of ``bench routing``: our policies, those of peers and an oracle on the same traces."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import geometric_mean

import numpy as np

from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.routing.peers import RayPowerOfTwo, RayPrefixAffinity, VllmRouterCacheAware
from cluster.routing import Fleet, Policy, PrefixIndex, RequestView, make_policy
from cluster.routing.prefix_policy import DECODE_WEIGHT, MISS_WEIGHT
from cluster.simulation.requests import Trace
from cluster.simulation.settings import LARGE_GPU, CachedTokens, MakePolicy, Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

REPLICAS = 16
RATES = {
    "conversation": 6.0,
    "toolagent": 12.0,
    "few-shot": 90.0,
    "rag": 40.0,
    "hot-prefix": 55.0,
    "chat": 55.0,
}
"""Requests/s for all replicas: high enough that routing matters, low enough to be served."""
GOALS = {
    "hit_rate_vs_oracle": ">= 0.95",
    "ttft_p90_vs_best_peer": "<= 0.7",
    "max_over_mean_load": "<= 1.25",
}
RAY_IMBALANCE_THRESHOLD = 10.0
"""Setting of Ray's prefix-aware router for one of the peers; its default ignores load."""


class OracleRouting:
    """Policy that knows the content of every cache and takes the least expected time.

    Taking the longest cached prefix instead would send all prompts with the same first block to one
    replica, whose cache then becomes too small, and would have fewer hits.
    """

    def __init__(self, cached_tokens: CachedTokens) -> None:
        self._cached_tokens = cached_tokens

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the replica with the least work, counting the uncached part of the prompt."""
        work_s = fleet.work_s(DECODE_WEIGHT)

        def cost_s(row: int) -> float:
            held = self._cached_tokens(fleet.ids[row] or "", request)
            uncached_s = (request.prompt_tokens - held) * float(fleet.table.miss_s[row])
            return float(work_s[row]) + MISS_WEIGHT * uncached_s

        free = [int(row) for row in np.flatnonzero(fleet.open_rows())]
        return fleet.ids[min(free, key=cost_s)] if free else None


OURS = ("prefix", "least-load", "session", "power-of-two")


def _our_policy(name: str) -> MakePolicy:
    return lambda index, _truth, seed: make_policy(name, index, seed)


def peer_policy(make: Callable[[int], Policy]) -> MakePolicy:
    return lambda _index, _truth, seed: make(seed)


def _oracle_policy(_index: PrefixIndex, truth: CachedTokens, _seed: int) -> Policy:
    return OracleRouting(truth)


PEERS: Mapping[str, MakePolicy] = {
    "round-robin": _our_policy("round-robin"),
    "ray power-of-two": peer_policy(RayPowerOfTwo),
    "ray prefix-aware": peer_policy(RayPrefixAffinity),
    "ray prefix-aware, 10": peer_policy(
        lambda seed: RayPrefixAffinity(seed, RAY_IMBALANCE_THRESHOLD)
    ),
    "vllm-router cache-aware": peer_policy(lambda _seed: VllmRouterCacheAware()),
}
ORACLE = "oracle"
IDEAL = "ideal"
"""Name of the lower bound without queueing, see ``ideal_ttft_p90_s``."""
POLICIES: Mapping[str, MakePolicy] = {
    **{name: _our_policy(name) for name in OURS},
    **PEERS,
    ORACLE: _oracle_policy,
}

TraceResult = dict[str, float]
"""Named numbers of one run of a trace, simulated or live."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace-s", type=float, default=600.0, help="duration of each trace")
    parser.add_argument(
        "--traces",
        nargs="+",
        choices=RATES,
        default=list(RATES),
        metavar="NAME",
        help=", ".join(RATES),
    )


def run(args: argparse.Namespace) -> Report:
    """Simulate every trace with every policy; each round has another seed."""
    results: dict[tuple[str, str], list[TraceResult]] = defaultdict(list)
    for seed in range(args.rounds):
        for trace in args.traces:
            requests = load_trace(trace, RATES[trace], args.trace_s, seed)
            results[trace, IDEAL].append({"ttft_p90_s": ideal_ttft_p90_s(requests)})
            for name, make in POLICIES.items():
                result = simulate(requests, Settings(LARGE_GPU, REPLICAS, make, seed=seed))
                summary = result.summary(0.0)
                results[trace, name].append(summary)
                text = f"hit rate {summary['hit_rate']:.3f}, TTFT p90 {summary['ttft_p90_s']:.3f} s"
                print_progress(seed, f"{trace}, {name}", text)
    return _report(results, args)


def ideal_ttft_p90_s(trace: Trace) -> float:
    """Return a lower bound for any routing: no queueing, and every earlier token is cached."""
    seen: set[int] = set()
    prefill_s = []
    for request in trace.requests:
        cached = next(
            (n for n, b in enumerate(request.blocks) if b not in seen), len(request.blocks)
        )
        computed = max(1, request.prompt_tokens - cached * trace.block_tokens)
        prefill_s.append(computed * LARGE_GPU.prefill_s_per_token)
        seen.update(request.blocks, request.answer_blocks)
    return float(np.percentile(prefill_s, 90)) if prefill_s else 0.0


def _report(results: dict[tuple[str, str], list[TraceResult]], args: argparse.Namespace) -> Report:
    traces = args.traces
    hits = {t: ratio(results[t, "prefix"], results[t, ORACLE], "hit_rate") for t in traces}
    ttfts = {t: _vs_best(results, t) for t in traces}
    bounds = {t: _vs_best(results, t, IDEAL) for t in traces}
    loads = {
        t: Summary(tuple(f["max_over_mean_load"] for f in results[t, "prefix"])) for t in traces
    }
    keys = {
        "hit_rate_vs_oracle": over_traces(hits, geometric_mean),
        "ttft_p90_vs_best_peer": over_traces(ttfts, geometric_mean),
        "max_over_mean_load": over_traces(loads, max),
        **{f"hit_rate_vs_oracle_{t}": hits[t] for t in traces},
        **{f"ttft_p90_vs_best_peer_{t}": ttfts[t] for t in traces},
        **{f"ttft_p90_bound_vs_best_peer_{t}": bounds[t] for t in traces},
        **{f"max_over_mean_load_{t}": loads[t] for t in traces},
    }
    return Report(
        keys=keys,
        goals=GOALS,
        tables=[_table(results, trace) for trace in traces],
        notes=[
            f"{REPLICAS} replicas, one router, {args.trace_s:g} s of each trace, from cold caches.",
            "Keys over all traces: geometric mean of the ratios, and the largest load.",
            "Best peer: smallest p90 TTFT of those that finish 99 % of the requests.",
            "Bound: no queueing, and every earlier token is cached.",
            "Load: mean number of requests in flight at a replica over time.",
        ],
    )


def ratio(ours: list[TraceResult], other: list[TraceResult], key: str) -> Summary:
    """Return the ratio of one number in each round."""
    return Summary(tuple(a[key] / max(1e-9, b[key]) for a, b in zip(ours, other, strict=True)))


def _vs_best(
    results: dict[tuple[str, str], list[TraceResult]], trace: str, name: str = "prefix"
) -> Summary:
    ratios = []
    for number, ours in enumerate(results[trace, name]):
        peers = [results[trace, peer][number] for peer in PEERS]
        served = [p["ttft_p90_s"] for p in peers if p["done"] >= 0.99 * p["requests"]]
        ratios.append(ours["ttft_p90_s"] / min(served) if served else math.nan)
    return Summary(tuple(ratios))


def over_traces(by_trace: dict[str, Summary], join: Callable[[list[float]], float]) -> Summary:
    """Join the traces' values in each round; skip traces that no peer can serve (NaN)."""
    rounds = zip(*(summary.rounds for summary in by_trace.values()), strict=True)
    return Summary(tuple(join([v for v in values if not math.isnan(v)]) for values in rounds))


def _table(results: dict[tuple[str, str], list[TraceResult]], trace: str) -> Table:
    shown = (
        "hit_rate",
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "itl_p90_s",
        "max_over_mean_load",
    )
    rows: list[tuple[CellValue, ...]] = []
    for name in POLICIES:
        of_policy = results[trace, name]
        finished = Summary(tuple(f["done"] / max(1, f["requests"]) for f in of_policy))
        rows.append((name, *(Summary(tuple(f[key] for f in of_policy)) for key in shown), finished))
    title = f"{trace}, {RATES[trace]:g} requests/s"
    columns = (
        "policy",
        "hit rate",
        "TTFT p50 s",
        "p90",
        "p99",
        "ITL p90 s",
        "max/mean load",
        "done",
    )
    return Table(title, columns, rows)
