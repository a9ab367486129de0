"""Latency that each server adds to an engine with a fixed time per token."""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

from benchmarks import processes, token_times
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.stream.measure import cpu_cost_table
from benchmarks.stream.targets import BARE, CLUSTER, TARGETS
from benchmarks.targets.running import RunningTarget
from benchmarks.token_times import StreamLoad, TokenTimes

PACE_S = 0.020
STREAMS = 64
TOKENS = 32
"""Completion tokens; short, so that a run has many first tokens."""
WARM_UP_S = 2.0
DURATION_FACTOR = 2
"""Duration relative to a measurement with the instant engine."""

PERCENTILES = {
    "ttft_ms_p50": ("ttft_s", 50),
    "ttft_ms_p99": ("ttft_s", 99),
    "itl_ms_p50": ("itl_s", 50),
    "itl_ms_p99": ("itl_s", 99),
}
GOALS = {"added_ttft_ms_p50": 1.0, "added_ttft_ms_p99": 3.0, "added_itl_ms_p99": 2.0}


@dataclass(frozen=True, slots=True)
class PacedResult:
    """One server in one round."""

    times: TokenTimes
    cpu_us_per_token: Mapping[str, float]
    """CPU microseconds per token by role of the target's processes."""


Results = dict[str, list[PacedResult]]
"""One result per round, by server."""


def run(args: argparse.Namespace) -> Report:
    """Measure the chosen servers, and the bare process as the baseline."""
    names = list(dict.fromkeys((*args.targets, BARE)))
    results: Results = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave(names, args.rounds):
        with TARGETS[name](PACE_S) as running:
            commands[name] = running.command
            result = _measure(running, args.seconds * DURATION_FACTOR)
        results[name].append(result)
        ttft_ms = percentile(result.times.ttft_s, 50) * 1e3
        print_progress(number, name, f"TTFT p50 {ttft_ms:6.2f} ms")
    return _report(results, commands)


def _measure(running: RunningTarget, seconds: float) -> PacedResult:
    endpoint = running.endpoint
    body = {
        "model": endpoint.model,
        "prompt": "Tell me something.",
        "max_tokens": TOKENS,
        "stream": True,
    }
    request = endpoint.encode_request("/v1/completions", body)
    load = StreamLoad(repeat(request), STREAMS, PACE_S, WARM_UP_S, seconds)
    before = processes.take_cpu_snapshot(running.home.path)
    times = token_times.measure(endpoint, load)
    used = processes.cpu_used(before, processes.take_cpu_snapshot(running.home.path))
    return PacedResult(times, {role: s / times.num_tokens * 1e6 for role, s in used.items()})


def _report(results: Results, commands: dict[str, str]) -> Report:
    latencies = {
        name: {
            key: Summary(tuple(percentile(getattr(r.times, times), p) * 1e3 for r in rounds))
            for key, (times, p) in PERCENTILES.items()
        }
        for name, rounds in results.items()
    }
    keys = {}
    if CLUSTER in latencies:
        for key in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p99"):
            keys[f"added_{key}"] = latencies[CLUSTER][key].minus(latencies[BARE][key])
    rows: list[list[CellValue]] = [[name, *row.values()] for name, row in latencies.items()]
    title = f"Latency in ms: {STREAMS} streams, engine with {PACE_S * 1e3:.0f} ms per token"
    costs = {name: [r.cpu_us_per_token for r in rounds] for name, rounds in results.items()}
    return Report(
        commands=commands,
        keys=keys,
        goals={key: f"<= {goal:g}" for key, goal in GOALS.items() if key in keys},
        tables=[
            Table(title, ("server", *PERCENTILES), rows),
            cpu_cost_table("CPU time per token in µs, paced engine", costs),
        ],
        details={"paced": latencies, "paced_cpu_us_per_token": costs},
        notes=[_note(results)],
    )


def _note(results: Results) -> str:
    all_times = [result.times for rounds in results.values() for result in rounds]
    cpu_s = sum(times.client_cpu_s for times in all_times)
    cpu_us = cpu_s / sum(times.num_tokens for times in all_times) * 1e6
    share = cpu_s / sum(times.wall_s for times in all_times)
    return (
        f"The client of the paced streams used {cpu_us:.0f} µs of CPU per token, {share:.0%} of a "
        "core. Its requests arrive at every phase of the engine's steps; each round has at least "
        f"{min(len(times.ttft_s) for times in all_times)} of them."
    )
