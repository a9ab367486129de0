"""What each path adds to the latency of an engine that takes its time."""

import argparse
from collections import defaultdict
from itertools import repeat

from benchmarks import token_times
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Summary, interleaved, percentile
from benchmarks.stream.paths import BARE, CLUSTER, TARGETS, say
from benchmarks.targets.running import Running
from benchmarks.token_times import Streams, TokenTimes

PACE_S = 0.020
STREAMS = 64
TOKENS = 32
"""Fewer than in the other part: more requests, so more first tokens, in the same time."""
WARM_UP_S = 2.0
SECONDS = 2
"""How much longer than a cell of the instant engine this one takes."""

NUMBERS = {
    "ttft_ms_p50": ("ttft_s", 50),
    "ttft_ms_p99": ("ttft_s", 99),
    "itl_ms_p50": ("itl_s", 50),
    "itl_ms_p99": ("itl_s", 99),
}
GOALS = {"added_ttft_ms_p50": 1.0, "added_ttft_ms_p99": 3.0, "added_itl_ms_p99": 2.0}

Rounds = dict[str, list[TokenTimes]]


def run(args: argparse.Namespace) -> Report:
    """Measure the cluster and the bare process, and whoever else was asked for."""
    names = list(dict.fromkeys((*args.targets, BARE)))
    found: Rounds = defaultdict(list)
    for number, name in interleaved(names, args.rounds):
        with TARGETS[name](PACE_S) as running:
            times = _measure(running, args.seconds * SECONDS)
        found[name].append(times)
        say(number, name, f"TTFT p50 {percentile(times.ttft_s, 50) * 1e3:6.2f} ms")
    return _report(found)


def _measure(running: Running, seconds: float) -> TokenTimes:
    endpoint = running.endpoint
    body = {
        "model": endpoint.model,
        "prompt": "Tell me something.",
        "max_tokens": TOKENS,
        "stream": True,
    }
    request = endpoint.request("/v1/completions", body)
    streams = Streams(repeat(request), STREAMS, PACE_S, WARM_UP_S, seconds)
    return token_times.measure(endpoint, streams)


def _report(found: Rounds) -> Report:
    numbers = {
        name: {
            key: Summary(tuple(percentile(getattr(r, values), p) * 1e3 for r in rounds))
            for key, (values, p) in NUMBERS.items()
        }
        for name, rounds in found.items()
    }
    keys = {}
    if CLUSTER in numbers:
        for key in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p99"):
            keys[f"added_{key}"] = numbers[CLUSTER][key].minus(numbers[BARE][key])
    rows: list[list[Cell]] = [[name, *columns.values()] for name, columns in numbers.items()]
    title = f"Latency in ms: {STREAMS} streams, an engine that takes {PACE_S * 1e3:.0f} ms a token"
    return Report(
        keys=keys,
        goals={key: f"<= {goal:g}" for key, goal in GOALS.items() if key in keys},
        tables=[Table(title, ("path", *NUMBERS), rows)],
        details={"paced": numbers},
        notes=[_note(found)],
    )


def _note(found: Rounds) -> str:
    rounds = [times for of_one in found.values() for times in of_one]
    tokens = sum(len(times.ttft_s) + len(times.itl_s) for times in rounds)
    cpu_s = sum(times.client_cpu_s for times in rounds)
    share = cpu_s / sum(times.wall_s for times in rounds)
    return (
        f"the client of the paced streams took {cpu_s / tokens * 1e6:.0f} us of CPU a token, "
        f"{share:.0%} of a core; its requests begin at every phase of the engine's steps, "
        f"{min(len(times.ttft_s) for times in rounds)} of them or more in a round"
    )
