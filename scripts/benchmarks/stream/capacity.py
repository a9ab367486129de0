"""Streams that a server relays before the time between tokens grows, and memory of idle streams.

Each server alone on the machine, with the client, gets more and more streams. Their limit is the
last number at which the 99th percentile of the time between two tokens is at most 2 ms above that
of a few streams. Memory is what 1,000 idle streams add to all processes of the server.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

from benchmarks import processes, token_times
from benchmarks.open_streams import open_streams, raise_file_limit, read_first_token
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.stream.targets import CLUSTER, TARGETS, VLLM_ROUTER
from benchmarks.targets.running import RunningTarget
from benchmarks.token_times import StreamLoad

PACE_S = 0.020
TOKENS = 256
FEW, MOST = 16, 4096
STEP = 1.2
"""Ratio of two consecutive numbers of streams."""
ALLOWED_S = 0.002
WARM_UP_S = 2.0
IDLE_PACE_S, IDLE = 2.0, 1000
"""Time between two tokens of an idle stream. Slower engines report too seldom for the cluster to
try so many requests at once within its queue timeout."""
PEERS = {CLUSTER: "ours", VLLM_ROUTER: "tuned"}
GOALS = {"streams_per_core_vs_vllm_router": ">= 1", "idle_pss_ratio_vs_vllm_router": "<= 1.2"}


@dataclass(frozen=True, slots=True)
class CapacityResult:
    """One server in one round."""

    streams_per_core: float
    idle_pss_mb: float
    """Memory that the idle streams added, in MB (PSS of all processes)."""


Results = Mapping[str, list[CapacityResult]]
"""One result per round, by server."""


def run(args: argparse.Namespace) -> Report:
    """Measure the chosen servers; each starts twice in a round, for one measurement each."""
    raise_file_limit()
    names = [name for name in PEERS if name in args.targets]
    results: dict[str, list[CapacityResult]] = defaultdict(list)
    for number, name in interleave(names, args.rounds):
        with TARGETS[name](PACE_S) as running:
            streams = _max_streams(running, args.seconds) / (os.cpu_count() or 1)
        with TARGETS[name](IDLE_PACE_S) as running:
            idle_mb = _idle_pss_mb(running)
        results[name].append(CapacityResult(streams, idle_mb))
        print_progress(number, name, f"{streams:.0f} streams per core, {idle_mb:.0f} MB")
    return _report(results)


def _max_streams(running: RunningTarget, seconds: float) -> int:
    limit_s = _itl_p99_s(running, FEW, seconds) + ALLOWED_S
    last, num = FEW, FEW * 4
    while num <= MOST and _itl_p99_s(running, num, seconds) <= limit_s:
        last, num = num, int(num * STEP)
    return last


def _itl_p99_s(running: RunningTarget, num_streams: int, seconds: float) -> float:
    endpoint = running.endpoint
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": TOKENS, "stream": True}
    request = endpoint.encode_request("/v1/completions", body)
    load = StreamLoad(repeat(request), num_streams, TOKENS * PACE_S, WARM_UP_S, seconds)
    return percentile(token_times.measure(endpoint, load).itl_s, 99)


def _idle_pss_mb(running: RunningTarget) -> float:
    endpoint = running.endpoint
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 256, "stream": True}
    with open_streams(endpoint, body, 1) as streams:  # loads what the first request needs
        read_first_token(streams[0])
    before_mb = processes.total_pss_mb(running.home.path)
    with open_streams(endpoint, body, IDLE) as streams:
        for stream in streams:
            read_first_token(stream)
        time.sleep(1.0)
        return processes.total_pss_mb(running.home.path) - before_mb


def _report(results: Results) -> Report:
    streams = {n: Summary(tuple(r.streams_per_core for r in found)) for n, found in results.items()}
    idle = {n: Summary(tuple(r.idle_pss_mb for r in found)) for n, found in results.items()}
    keys = {}
    if len(results) == len(PEERS):
        keys = {
            "streams_per_core_vs_vllm_router": streams[CLUSTER].over(streams[VLLM_ROUTER]),
            "idle_pss_ratio_vs_vllm_router": idle[CLUSTER].over(idle[VLLM_ROUTER]),
        }
    rows = [(name, streams[name], idle[name]) for name in results]
    columns = ("server", "streams per core", f"MB for {IDLE:,} idle streams")
    return Report(
        keys=keys,
        goals={key: GOALS[key] for key in keys},
        tables=[Table("Capacity with 20 ms per token, and memory", columns, rows)],
        details={"capacity": results},
        values={"streams_per_core": _sides(streams), "idle_pss_mb": _sides(idle)},
    )


def _sides(summaries: Mapping[str, Summary]) -> dict[str, Summary]:
    return {PEERS[name]: summary for name, summary in summaries.items()}
