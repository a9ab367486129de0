"""Streams that a server relays before the time between tokens grows.

Each server alone on the machine, with the client, gets twice as many streams again and again. Their
limit is the last number at which none fails and the 99th percentile of the time between two tokens
is at most 2 ms above that of a few streams; bisection finds it to within 20 %.
"""

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat

from benchmarks import processes, token_times
from benchmarks.endpoint import TargetError
from benchmarks.open_streams import raise_file_limit
from benchmarks.report import Report, print_progress
from benchmarks.rounds import interleave, percentile
from benchmarks.stream.pairs import PEERS, pair_report
from benchmarks.stream.targets import TARGETS
from benchmarks.targets.running import RunningTarget
from benchmarks.token_times import StreamLoad

PACE_S = 0.020
TOKENS = 256
FEW, MOST = 16, 4096
STEP = 1.2
"""Largest ratio between the limit and a number of streams that is over it."""
ALLOWED_S = 0.002
WARM_UP_S = 2.0
GOAL = ">= 1"


def run(args: argparse.Namespace) -> Report:
    raise_file_limit()
    results: dict[str, list[float | None]] = defaultdict(list)
    commands: dict[str, str] = {}
    for number, name in interleave([name for name in PEERS if name in args.targets], args.rounds):
        with TARGETS[name](PACE_S) as running:
            commands[name] = running.command
            found = find_max_streams(partial(_itl_p99_s, running, args.seconds))
        results[name].append(None if found is None else found / (os.cpu_count() or 1))
        print_progress(number, name, f"{found or 'not even a few'} streams")
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


def make_report(
    results: Mapping[str, Sequence[float | None]], commands: Mapping[str, str]
) -> Report:
    """Return the ratio of both servers, and the streams per core of each, by round."""
    title = "Streams per core with 20 ms per token"
    key = "streams_per_core_vs_vllm_router"
    return pair_report(key, GOAL, "streams_per_core", title, results, commands)
