"""Streams that a server relays before the time between tokens grows, and memory of idle streams.

Each server alone on the machine, with the client, gets twice as many streams again and again. Their
limit is the last number at which none fails and the 99th percentile of the time between two tokens
is at most 2 ms above that of a few streams; bisection finds it to within 20 %. Memory is what 1,000
idle streams add to all processes of the server.
"""

import argparse
import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from benchmarks import processes, token_times
from benchmarks.endpoint import TargetError
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
"""Largest ratio between the limit and a number of streams that is over it."""
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

    streams_per_core: float | None
    """None if the server did not relay even a few streams."""
    idle_pss_mb: float | None
    """Memory that the idle streams added, in MB (PSS of all processes); None if some failed."""


Results = Mapping[str, list[CapacityResult]]
"""One result per round, by server."""
Values = Mapping[str, Sequence[float | None]]
"""One value per round, by server; None if it was not measured."""


def run(args: argparse.Namespace) -> Report:
    """Measure the chosen servers; each starts twice in a round, for one measurement each."""
    raise_file_limit()
    names = [name for name in PEERS if name in args.targets]
    results: dict[str, list[CapacityResult]] = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave(names, args.rounds):
        with TARGETS[name](PACE_S) as running:
            commands[name] = running.command
            found = find_max_streams(partial(_itl_p99_s, running, args.seconds))
        streams = None if found is None else found / (os.cpu_count() or 1)
        idle_mb = None
        with (
            TARGETS[name](IDLE_PACE_S) as running,
            contextlib.suppress(TargetError, OSError),  # too many streams
        ):
            idle_mb = _idle_pss_mb(running)
        results[name].append(CapacityResult(streams, idle_mb))
        shown = [f"{value:.0f}" if value else "not measured" for value in (streams, idle_mb)]
        print_progress(number, name, f"streams per core: {shown[0]}, MB: {shown[1]}")
    return make_report(results, commands)


def find_max_streams(itl_p99_s: Callable[[int], float]) -> int | None:
    """Return the most streams that a server relays in time; None if it fails with a few.

    Args:
        itl_p99_s: Measures a number of streams; raises TargetError or OSError if some fail.
    """
    try:
        limit_s = itl_p99_s(FEW) + ALLOWED_S
    except (TargetError, OSError):
        return None

    def suffices(num: int) -> bool:
        try:
            return itl_p99_s(num) <= limit_s
        except (TargetError, OSError):
            return False

    good, bad = FEW, FEW * 2
    while suffices(bad):
        good, bad = bad, bad * 2
        if bad > MOST:
            return good
    while bad > good * STEP:
        middle = math.isqrt(good * bad)  # the limit is relative, too
        good, bad = (middle, bad) if suffices(middle) else (good, middle)
    return good


def _itl_p99_s(running: RunningTarget, seconds: float, num_streams: int) -> float:
    endpoint = running.endpoint
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": TOKENS, "stream": True}
    request = endpoint.encode_request("/v1/completions", body)
    load = StreamLoad(repeat(request), num_streams, TOKENS * PACE_S, WARM_UP_S, seconds)
    try:
        itl_s = token_times.measure(endpoint, load).itl_s
    except (TargetError, OSError):
        processes.wait_idle(running.home.path)
        raise
    if not itl_s:
        raise TargetError(f"No stream of {num_streams} was measured.")
    return percentile(itl_s, 99)


def _idle_pss_mb(running: RunningTarget) -> float:
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


def make_report(results: Results, commands: Mapping[str, str] | None = None) -> Report:
    """Return the ratios of both servers, and the numbers of each."""
    streams = {name: [one.streams_per_core for one in found] for name, found in results.items()}
    idle = {name: [one.idle_pss_mb for one in found] for name, found in results.items()}
    ratios = {
        "streams_per_core_vs_vllm_router": _ratio(streams),
        "idle_pss_ratio_vs_vllm_router": _ratio(idle),
    }
    keys = {key: ratio for key, ratio in ratios.items() if ratio is not None}
    rows = [(name, _summary(streams[name]), _summary(idle[name])) for name in results]
    columns = ("server", "streams per core", f"MB for {IDLE:,} idle streams")
    return Report(
        keys=keys,
        goals={key: GOALS[key] for key in keys},
        tables=[Table("Capacity with 20 ms per token, and memory", columns, rows)],
        details={"capacity": results},
        commands=dict(commands or {}),
        values={"streams_per_core": _sides(streams), "idle_pss_mb": _sides(idle)},
    )


def _summary(values: Iterable[float | None]) -> Summary | None:
    measured = tuple(value for value in values if value is not None)
    return Summary(measured) if measured else None


def _ratio(values: Values) -> Summary | None:
    """Return our value over the peer's in the rounds that measured both."""
    pairs = zip(values.get(CLUSTER, ()), values.get(VLLM_ROUTER, ()), strict=False)
    return _summary(None if a is None or b is None else a / b for a, b in pairs)


def _sides(values: Values) -> dict[str, Summary]:
    summaries = {PEERS[name]: _summary(found) for name, found in values.items()}
    return {side: summary for side, summary in summaries.items() if summary is not None}
