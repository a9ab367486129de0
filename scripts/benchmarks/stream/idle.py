"""Memory that idle streams add to all processes of a server."""

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks import processes
from benchmarks.endpoint import TargetError
from benchmarks.open_streams import open_streams, raise_file_limit, read_first_token
from benchmarks.report import Report, print_progress
from benchmarks.rounds import interleave
from benchmarks.stream.pairs import PEERS, pair_report
from benchmarks.stream.targets import TARGETS
from benchmarks.targets.running import RunningTarget

PACE_S, IDLE = 2.0, 1000
"""Time between two tokens of an idle stream."""
GOAL = "<= 1.2"


def run(args: argparse.Namespace) -> Report:
    raise_file_limit()
    results: dict[str, list[float | None]] = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave([name for name in PEERS if name in args.targets], args.rounds):
        with TARGETS[name](PACE_S) as running:
            commands[name] = running.command
            try:
                results[name].append(_pss_mb(running))
                shown = f"{results[name][-1]:.0f} MB"
            except (TargetError, OSError) as error:  # too many streams
                results[name].append(None)
                shown = str(error)[:200]
        print_progress(number, name, f"{IDLE} idle streams: {shown}")
    return make_report(results, commands)


def _pss_mb(running: RunningTarget) -> float:
    endpoint = running.endpoint
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 256, "stream": True}
    with open_streams(endpoint, body, 1) as streams:  # loads what the first request needs
        read_first_token(streams[0])
    before_mb = sum(processes.pss_mb(running.home.path).values())
    with open_streams(endpoint, body, IDLE) as streams:
        for stream in streams:
            read_first_token(stream)
        time.sleep(1.0)
        return sum(processes.pss_mb(running.home.path).values()) - before_mb


def make_report(
    results: Mapping[str, Sequence[float | None]], commands: Mapping[str, str]
) -> Report:
    """Return the ratio of both servers, and the memory of each in MB, by round."""
    title = f"Memory of {IDLE:,} idle streams in MB (PSS of all processes)"
    return pair_report(
        "idle_pss_ratio_vs_vllm_router", GOAL, "idle_pss_mb", title, results, commands
    )
