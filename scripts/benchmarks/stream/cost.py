"""CPU time per token of all processes at an engine's pace, without starts and ends of streams.

All streams are open before the measurement begins and go on after it. The client only counts, so
it leaves the cores to the servers; it is not part of the cost.
"""

import argparse
import contextlib
import selectors
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.endpoint import TargetError
from benchmarks.open_streams import open_streams, raise_file_limit, read_first_token
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.stream.targets import BARE, CLUSTER, TARGETS, VLLM_ROUTER
from benchmarks.targets.running import RunningTarget
from benchmarks.token_times import EVENT

TOKENS = 8000
"""Completion tokens; more than any stream gets, so that none ends."""
SETTLE_S = 2.0
PEERS = (CLUSTER, VLLM_ROUTER, BARE)


@dataclass(frozen=True, slots=True)
class Point:
    """A number of streams at a pace."""

    streams: int
    pace_s: float

    @property
    def name(self) -> str:
        return f"{self.streams:,} x {self.pace_s * 1e3:g} ms"


POINTS = {
    "": Point(64, 0.020),
    "_64_at_5_ms": Point(64, 0.005),
    "_64_at_50_ms": Point(64, 0.050),
    "_1000": Point(1000, 0.050),
    "_5000": Point(5000, 0.050),  # last, because it overloads small machines
}
"""Points by the suffix of their keys."""
GOALS = {"paced_cpu_us_per_token": "<= 50", "paced_cpu_ratio_vs_vllm_router": "<= 1"}


@dataclass(frozen=True, slots=True)
class CostResult:
    """One server at one point in one round."""

    tokens_s: float
    cpu_us_per_token: Mapping[str, float]
    """CPU microseconds per token by role of the target's processes."""

    @property
    def total_us(self) -> float:
        return sum(self.cpu_us_per_token.values())


Results = dict[tuple[str, str], list[CostResult]]
"""One result per round, by server and suffix of the point."""


def run(args: argparse.Namespace) -> Report:
    """Measure the chosen servers at all points; those with the same pace share a server."""
    raise_file_limit()
    names = [name for name in PEERS if name in args.targets]
    points = {suffix: point for suffix, point in POINTS.items() if point.name in args.points}
    results: Results = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave(names, args.rounds):
        for pace_s in dict.fromkeys(point.pace_s for point in points.values()):
            with TARGETS[name](pace_s) as running:
                commands[name] = running.command
                for suffix, point in points.items():
                    if point.pace_s == pace_s:
                        shown = "not measured"
                        with contextlib.suppress(TargetError, OSError):  # too many streams
                            result = measure(running, point.streams, args.seconds)
                            results[name, suffix].append(result)
                            shown = f"{result.total_us:6.1f} µs per token"
                        print_progress(number, name, f"{point.name:>15} {shown}")
    return _report(results, commands)


def measure(running: RunningTarget, num_streams: int, seconds: float) -> CostResult:
    """Open the streams, and return the CPU time per token while all of them are open."""
    endpoint, home = running.endpoint, running.home.path
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": TOKENS, "stream": True}
    with open_streams(endpoint, body, num_streams) as streams:
        for stream in streams:
            read_first_token(stream)
        count_tokens(streams, SETTLE_S)
        before, began = processes.take_cpu_snapshot(home), time.perf_counter()
        num_tokens = count_tokens(streams, seconds)
        wall_s = time.perf_counter() - began
        used = processes.cpu_used(before, processes.take_cpu_snapshot(home))
    processes.wait_idle(home)
    costs = {role: cpu_s / num_tokens * 1e6 for role, cpu_s in used.items()}
    return CostResult(num_tokens / wall_s, costs)


def count_tokens(streams: Iterable[socket.socket], seconds: float) -> int:
    """Read from all streams for some seconds; return the number of tokens.

    Raises:
        TargetError: A stream has ended.
    """
    num_tokens, deadline_s = 0, time.perf_counter() + seconds
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ, stream.recv)
        while (left_s := deadline_s - time.perf_counter()) > 0:
            for key, _ in selector.select(left_s):
                if not (data := key.data(65536)):
                    raise TargetError("A stream ended during the measurement.")
                num_tokens += data.count(EVENT)
    return num_tokens


def _report(results: Results, commands: dict[str, str]) -> Report:
    keys: dict[str, Summary] = {}
    values: dict[str, dict[str, Summary]] = {}
    for suffix in POINTS:
        ours, theirs = (
            Summary(tuple(result.total_us for result in results.get((name, suffix), ())))
            for name in (CLUSTER, VLLM_ROUTER)
        )
        if ours.rounds:
            keys[f"paced_cpu_us_per_token{suffix}"] = ours
        if ours.rounds and len(ours.rounds) == len(theirs.rounds):
            keys[f"paced_cpu_ratio_vs_vllm_router{suffix}"] = ours.over(theirs)
            values[f"paced_cpu_us{suffix}"] = {"ours": ours, "tuned": theirs}
    return Report(
        commands=commands,
        keys=keys,
        goals={key: goal for key, goal in GOALS.items() if key in keys},
        tables=[_table(results)],
        details={"cost": {f"{name}{suffix}": rounds for (name, suffix), rounds in results.items()}},
        values=values,
        notes=[
            "With more tokens per second than a server can relay, its pace is slower than asked. "
            "Streams that it does not start within minutes are not measured."
        ],
    )


def _table(results: Results) -> Table:
    rows: list[Sequence[CellValue]] = []
    for (name, suffix), rounds in results.items():
        roles = {role: [r.cpu_us_per_token.get(role, 0.0) for r in rounds] for role in _ROLES}
        cells = [Summary(tuple(each)).median or None for each in roles.values()]
        total = Summary(tuple(result.total_us for result in rounds))
        rate = Summary(tuple(result.tokens_s for result in rounds))
        rows.append((name, POINTS[suffix].name, *cells, total, rate))
    columns = ("server", "streams", *_ROLES, "total", "tokens/s")
    return Table("CPU time per token in µs, long streams", columns, rows)


_ROLES = ("haproxy", "router", "engine", processes.OTHER)
