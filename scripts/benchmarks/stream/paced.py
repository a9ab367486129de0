"""What each path adds to the latency of an engine that takes its time."""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

from benchmarks import cpu, token_times
from benchmarks.report import Cell as ReportCell
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved, percentile
from benchmarks.stream.costs import cost_table
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


@dataclass(frozen=True, slots=True)
class Cell:
    """One path in one round."""

    times: TokenTimes
    cpu_us_per_token: Mapping[str, float]
    """By the parts of the target."""


Cells = dict[str, list[Cell]]


def run(args: argparse.Namespace) -> Report:
    """Measure the cluster and the bare process, and whoever else was asked for."""
    names = list(dict.fromkeys((*args.targets, BARE)))
    cells: Cells = defaultdict(list)
    for number, name in interleaved(names, args.rounds):
        with TARGETS[name](PACE_S) as running:
            cell = _cell(running, args.seconds * SECONDS)
        cells[name].append(cell)
        say(number, name, f"TTFT p50 {percentile(cell.times.ttft_s, 50) * 1e3:6.2f} ms")
    return _report(cells)


def _cell(running: Running, seconds: float) -> Cell:
    endpoint = running.endpoint
    body = {
        "model": endpoint.model,
        "prompt": "Tell me something.",
        "max_tokens": TOKENS,
        "stream": True,
    }
    request = endpoint.request("/v1/completions", body)
    streams = Streams(repeat(request), STREAMS, PACE_S, WARM_UP_S, seconds)
    before = cpu.snapshot(running.home.path)
    times = token_times.measure(endpoint, streams)
    spent = cpu.spent(before, cpu.snapshot(running.home.path))
    return Cell(times, {part: s / times.num_tokens * 1e6 for part, s in spent.items()})


def _report(cells: Cells) -> Report:
    numbers = {
        name: {
            key: Summary(tuple(percentile(getattr(c.times, values), p) * 1e3 for c in rounds))
            for key, (values, p) in NUMBERS.items()
        }
        for name, rounds in cells.items()
    }
    keys = {}
    if CLUSTER in numbers:
        for key in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p99"):
            keys[f"added_{key}"] = numbers[CLUSTER][key].minus(numbers[BARE][key])
    rows: list[list[ReportCell]] = [[name, *columns.values()] for name, columns in numbers.items()]
    title = f"Latency in ms: {STREAMS} streams, an engine that takes {PACE_S * 1e3:.0f} ms a token"
    costs = {name: [cell.cpu_us_per_token for cell in rounds] for name, rounds in cells.items()}
    return Report(
        keys=keys,
        goals={key: f"<= {goal:g}" for key, goal in GOALS.items() if key in keys},
        tables=[
            Table(title, ("path", *NUMBERS), rows),
            cost_table("CPU us for a token, paced engine", costs),
        ],
        details={"paced": numbers, "paced_cpu_us_per_token": costs},
        notes=[_note(cells)],
    )


def _note(cells: Cells) -> str:
    rounds = [cell.times for of_one in cells.values() for cell in of_one]
    cpu_s = sum(times.client_cpu_s for times in rounds)
    cpu_us = cpu_s / sum(times.num_tokens for times in rounds) * 1e6
    return (
        f"the client of the paced streams took {cpu_us:.0f} us of CPU a token, "
        f"{cpu_s / sum(times.wall_s for times in rounds):.0%} of a core; its requests begin at "
        f"every phase of the engine's steps, {min(len(times.ttft_s) for times in rounds)} of them "
        f"or more in a round"
    )
