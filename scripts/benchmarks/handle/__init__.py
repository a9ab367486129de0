"""Tandem's client in another Ray job, compared with a plain Ray Serve handle to the same engine.

Both call the instant simulated engine from a separate driver: 32 concurrent async calls, streaming
and not, and single synchronous calls. The client goes through the router; the handle calls the
engine's deployment directly.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.handle.driver import CONCURRENT, TOKENS
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.targets.running import RunningTarget, SimTarget
from benchmarks.targets.serve_handle import serve_default, serve_handle
from benchmarks.targets.tandem import tandem

CLIENT, HANDLE, HANDLE_DEFAULT = "client", "handle", "handle-default"

TARGETS: Mapping[str, SimTarget] = {
    CLIENT: tandem,
    HANDLE: serve_handle,
    HANDLE_DEFAULT: serve_default,
}
RATES = {
    "stream_req_s": "streams/s",
    "stream_tokens_s": "tokens/s",
    "unary_req_s": "responses/s",
}
LATENCIES = {
    "first_ms_p50": "first token, ms",
    "stream_ms_p50": "complete stream, ms",
    "unary_ms_p50": "unary, ms",
    "unary_ms_p99": "unary p99, ms",
}
DRIVER_START_S = 60.0
"""Time for a driver to start and exit."""

Rounds = dict[str, list[dict[str, float]]]
"""Results of each round, by caller."""


@dataclass(frozen=True, slots=True)
class DriverRun:
    """Parameters of one run of the driver."""

    caller: str
    mode: str
    """``concurrent`` or ``single``."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="callers"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")


def run(args: argparse.Namespace) -> Report:
    if args.quick:
        args.seconds = min(args.seconds, 2.0)
    results: Rounds = defaultdict(list)
    for number, name in interleave(args.targets, args.rounds):
        caller = CLIENT if name == CLIENT else HANDLE
        with TARGETS[name](0.0) as running:
            numbers = _run_driver(running, DriverRun(caller, "concurrent", args.seconds))
            numbers |= _run_driver(running, DriverRun(caller, "single", args.seconds))
        results[name].append(numbers)
        print_progress(number, name, f"{numbers['stream_tokens_s']:10,.0f} tokens/s")
    return make_report(results)


def _run_driver(running: RunningTarget, run: DriverRun) -> dict[str, float]:
    """Run a driver as a Ray job of the target; return its results."""
    out = running.home.path / f"{run.mode}.json"
    words = (run.caller, run.mode, running.ray_address, str(run.seconds), str(out))
    environment = dict(running.job_environment)
    if run.mode == "single":  # there is no event loop for the handle's router
        environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
    running.home.run(
        *(sys.executable, "-m", "benchmarks.handle.driver", *words),
        timeout_s=DRIVER_START_S + 4 * run.seconds,
        environment=environment,
    )
    numbers: dict[str, float] = json.loads(out.read_text(encoding="ascii"))
    return numbers


def make_report(results: Rounds) -> Report:
    """Return the ratios per round and the results of each caller."""
    numbers = {
        name: {key: Summary(tuple(one[key] for one in rounds)) for key in (*RATES, *LATENCIES)}
        for name, rounds in results.items()
    }
    keys = {
        f"{name.replace('-', '_')}_{key}": value
        for name, of_caller in numbers.items()
        for key, value in of_caller.items()
    }
    return Report(
        keys=_ratios(numbers) | keys,
        tables=[
            _table(f"{CONCURRENT} concurrent calls of {TOKENS} tokens", RATES, numbers),
            _table(f"Single calls of {TOKENS} tokens", LATENCIES, numbers),
        ],
        details={"handle": dict(results)},
        notes=[
            "handle: Serve with throughput settings; handle-default: Serve with its defaults.",
            "The client parses its responses; the chunks of a handle are not parsed.",
        ],
    )


def _ratios(numbers: Mapping[str, Mapping[str, Summary]]) -> dict[str, Summary]:
    ratios = {}
    for peer in (HANDLE, HANDLE_DEFAULT):
        if CLIENT in numbers and peer in numbers:
            for kind in ("stream", "unary"):
                ours, theirs = (numbers[name][f"{kind}_req_s"] for name in (CLIENT, peer))
                ratios[f"ratio_{kind}_vs_{peer.replace('-', '_')}"] = ours.over(theirs)
    return ratios


def _table(
    title: str, columns: Mapping[str, str], numbers: Mapping[str, Mapping[str, Summary]]
) -> Table:
    rows: list[list[CellValue]] = [
        [name, *(of_caller[key] for key in columns)] for name, of_caller in numbers.items()
    ]
    return Table(title, ("caller", *columns.values()), rows)
