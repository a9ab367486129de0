"""Part 2 of ``bench routing``: our policies, other routers' and an oracle on the same traces."""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary
from benchmarks.routing.peers import RayPowerOfTwo, RayPrefixAffinity, VllmRouterCacheAware
from benchmarks.stream.paths import say
from cluster.routing import Fleet, Policy, PrefixIndex, RequestView, make_policy
from cluster.routing.prefix_policy import DECODE_WEIGHT, MISS_WEIGHT
from cluster.simulation.requests import Trace
from cluster.simulation.settings import LARGE_GPU, CachedTokens, MakePolicy, Settings
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load

REPLICAS = 16
RATES = {
    "conversation": 6.0,
    "toolagent": 12.0,
    "few-shot": 90.0,
    "rag": 40.0,
    "hot-prefix": 55.0,
    "chat": 55.0,
}
"""Requests/s for all replicas: so many that where a request goes matters, and all can be served."""
GOALS = {
    "hit_rate_vs_oracle": ">= 0.95",
    "ttft_p90_vs_best_peer": "<= 0.7",
    "max_over_mean_load": "<= 1.25",
}
IMBALANCED = 10.0
"""Ray's threshold, which is the user's to set: by default load is never looked at."""


class Oracle:
    """Knows what every cache holds or is computing, and takes the least expected time by that.

    One that looks at the caches alone (``peers.Oracle``) sends all prompts with the same first
    block to one replica, whose cache is soon too small: it hits less than those that know less.
    """

    def __init__(self, cached_tokens: CachedTokens) -> None:
        self._cached_tokens = cached_tokens

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The replica with the least work and uncached prompt together."""
        work_s = fleet.work_s(DECODE_WEIGHT)

        def cost_s(slot: int) -> float:
            held = self._cached_tokens(fleet.ids[slot] or "", request)
            uncached_s = (request.prompt_tokens - held) * float(fleet.table.miss_s[slot])
            return float(work_s[slot]) + MISS_WEIGHT * uncached_s

        free = [int(slot) for slot in np.flatnonzero(fleet.open_rows())]
        return fleet.ids[min(free, key=cost_s)] if free else None


OURS = ("prefix", "least-load", "session", "power-of-two")


def _ours(name: str) -> MakePolicy:
    return lambda index, _truth, seed: make_policy(name, index, seed)


def _peer(make: Callable[[int], Policy]) -> MakePolicy:
    return lambda _index, _truth, seed: make(seed)


def _oracle(_index: PrefixIndex, truth: CachedTokens, _seed: int) -> Policy:
    return Oracle(truth)


PEERS: Mapping[str, MakePolicy] = {
    "round-robin": _ours("round-robin"),
    "ray power-of-two": _peer(RayPowerOfTwo),
    "ray prefix-aware": _peer(RayPrefixAffinity),
    "ray prefix-aware, 10": _peer(lambda seed: RayPrefixAffinity(seed, IMBALANCED)),
    "vllm-router cache-aware": _peer(lambda _seed: VllmRouterCacheAware()),
}
ORACLE = "oracle"
ALONE = "alone"
POLICIES: Mapping[str, MakePolicy] = {
    **{name: _ours(name) for name in OURS},
    **PEERS,
    ORACLE: _oracle,
}

Found = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--trace-s", type=float, default=600.0, help="length of each trace")
    parser.add_argument("--traces", nargs="+", choices=RATES, default=list(RATES), metavar="NAME")


def run(args: argparse.Namespace) -> Report:
    """Serve every trace with every policy, with another seed in every round."""
    if args.quick:
        args.trace_s = min(args.trace_s, 120.0)
    found: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for seed in range(args.rounds):
        for trace in args.traces:
            requests = load(trace, RATES[trace], args.trace_s, seed)
            found[trace, ALONE].append({"ttft_p90_s": alone_ttft_p90_s(requests)})
            for name, make in POLICIES.items():
                result = simulate(requests, Settings(LARGE_GPU, REPLICAS, make, seed=seed))
                seen = result.summary(0.0)
                found[trace, name].append(seen)
                text = f"hits {seen['hit_rate']:.3f}, TTFT p90 {seen['ttft_p90_s']:.3f} s"
                say(seed, f"{trace}, {name}", text)
    return _report(found, args)


def alone_ttft_p90_s(trace: Trace) -> float:
    """What no choice of replicas goes below: no request waits, and all that was seen is cached."""
    seen: set[int] = set()
    taken_s = []
    for request in trace.requests:
        held = next((n for n, b in enumerate(request.blocks) if b not in seen), len(request.blocks))
        computed = max(1, request.prompt_tokens - held * trace.block_tokens)
        taken_s.append(computed * LARGE_GPU.prefill_s_per_token)
        seen.update(request.blocks, request.answer_blocks)
    return float(np.percentile(taken_s, 90)) if taken_s else 0.0


def _report(found: dict[tuple[str, str], list[Found]], args: argparse.Namespace) -> Report:
    traces = args.traces
    hits = {t: ratio(found[t, "prefix"], found[t, ORACLE], "hit_rate") for t in traces}
    ttfts = {t: _vs_best(found, t) for t in traces}
    bounds = {t: _vs_best(found, t, ALONE) for t in traces}
    loads = {t: Summary(tuple(f["max_over_mean_load"] for f in found[t, "prefix"])) for t in traces}
    keys = {
        "hit_rate_vs_oracle": over_traces(hits, statistics.geometric_mean),
        "ttft_p90_vs_best_peer": over_traces(ttfts, statistics.geometric_mean),
        "max_over_mean_load": over_traces(loads, max),
        **{f"hit_rate_vs_oracle_{t}": hits[t] for t in traces},
        **{f"ttft_p90_vs_best_peer_{t}": ttfts[t] for t in traces},
        **{f"ttft_p90_bound_vs_best_peer_{t}": bounds[t] for t in traces},
        **{f"max_over_mean_load_{t}": loads[t] for t in traces},
    }
    return Report(
        keys=keys,
        goals=GOALS,
        tables=[_table(found, trace) for trace in traces],
        notes=[
            f"{REPLICAS} replicas, one router, {args.trace_s:g} s of each trace, from cold caches",
            "over traces: the geometric mean of the ratios, and the largest load",
            "the best peer: whichever has the smallest p90 and answers 99 % of the requests",
            "bound: every request alone, with all that was seen before in its cache",
            "load: the mean over time of a replica's ongoing requests",
        ],
    )


def ratio(ours: list[Found], other: list[Found], key: str) -> Summary:
    """Of one number, round by round."""
    return Summary(tuple(a[key] / max(1e-9, b[key]) for a, b in zip(ours, other, strict=True)))


def _vs_best(
    found: dict[tuple[str, str], list[Found]], trace: str, name: str = "prefix"
) -> Summary:
    ratios = []
    for number, ours in enumerate(found[trace, name]):
        peers = [found[trace, peer][number] for peer in PEERS]
        served = [p["ttft_p90_s"] for p in peers if p["done"] >= 0.99 * p["requests"]]
        ratios.append(ours["ttft_p90_s"] / min(served) if served else math.nan)
    return Summary(tuple(ratios))


def over_traces(of: dict[str, Summary], join: Callable[[list[float]], float]) -> Summary:
    """One number for each round; a trace that no peer can serve says nothing."""
    rounds = zip(*(summary.rounds for summary in of.values()), strict=True)
    return Summary(tuple(join([v for v in values if not math.isnan(v)]) for values in rounds))


def _table(found: dict[tuple[str, str], list[Found]], trace: str) -> Table:
    shown = (
        "hit_rate",
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "itl_p90_s",
        "max_over_mean_load",
    )
    rows: list[tuple[Cell, ...]] = []
    for name in POLICIES:
        seen = found[trace, name]
        answered = Summary(tuple(f["done"] / max(1, f["requests"]) for f in seen))
        rows.append((name, *(Summary(tuple(f[key] for f in seen)) for key in shown), answered))
    title = f"{trace}, {RATES[trace]:g} requests/s"
    columns = ("policy", "hits", "TTFT p50 s", "p90", "p99", "ITL p90 s", "max/mean load", "done")
    return Table(title, columns, rows)
