"""The client in another Ray job against a bare handle of Ray Serve to the same engine.

Both call the instant simulated engine from a driver of their own: 32 at a time and awaited,
streaming and not; and one after the other, synchronously. The client comes through a router with
all that it does, the handle calls the engine's deployment itself.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.handle.driver import CONCURRENT, TOKENS
from benchmarks.report import Cell as ReportCell
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.stream.paths import say
from benchmarks.targets.running import Running, Target
from benchmarks.targets.serve_handle import serve_default, serve_handle
from benchmarks.targets.tandem import tandem

CLIENT, HANDLE, HANDLE_DEFAULT = "client", "handle", "handle-default"

TARGETS: Mapping[str, Target] = {
    CLIENT: tandem,
    HANDLE: serve_handle,
    HANDLE_DEFAULT: serve_default,
}
RATES = {
    "stream_req_s": "streams/s",
    "stream_tokens_s": "tokens/s",
    "unary_req_s": "answers/s",
}
TIMES = {
    "first_ms_p50": "first token, ms",
    "stream_ms_p50": "stream, ms",
    "unary_ms_p50": "answer, ms",
    "unary_ms_p99": "p99",
}
JOIN_S = 60.0
"""For a driver to start and end."""

Rounds = dict[str, list[dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Calls:
    """A driver's run: which caller, and how it calls."""

    caller: str
    how: str
    """``concurrent`` or ``single``."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench handle``."""
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kind of call")


def run(args: argparse.Namespace) -> Report:
    """Measure every caller in every round."""
    if args.quick:
        args.seconds = min(args.seconds, 2.0)
    found: Rounds = defaultdict(list)
    for number, name in interleaved(args.targets, args.rounds):
        caller = CLIENT if name == CLIENT else HANDLE
        with TARGETS[name](0.0) as running:
            numbers = _drive(running, Calls(caller, "concurrent", args.seconds))
            numbers |= _drive(running, Calls(caller, "single", args.seconds))
        found[name].append(numbers)
        say(number, name, f"{numbers['stream_tokens_s']:10,.0f} tokens/s")
    return report(found)


def _drive(running: Running, calls: Calls) -> dict[str, float]:
    """Run a driver that joins the Ray of ``running``; what it measured, by name."""
    out = running.home.path / f"{calls.how}.json"
    words = (calls.caller, calls.how, running.ray_address, str(calls.seconds), str(out))
    environment = dict(running.job_environment)
    if calls.how == "single":  # a caller without an event loop cannot run the handle's router
        environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
    running.home.run(
        *(sys.executable, "-m", "benchmarks.handle.driver", *words),
        timeout_s=JOIN_S + 4 * calls.seconds,
        environment=environment,
    )
    numbers: dict[str, float] = json.loads(out.read_text(encoding="ascii"))
    return numbers


def report(found: Rounds) -> Report:
    """Ratios round by round, and the numbers of each caller."""
    numbers = {
        name: {key: Summary(tuple(one[key] for one in rounds)) for key in (*RATES, *TIMES)}
        for name, rounds in found.items()
    }
    keys = {
        f"{name.replace('-', '_')}_{key}": value
        for name, of_one in numbers.items()
        for key, value in of_one.items()
    }
    return Report(
        keys=_ratios(numbers) | keys,
        tables=[
            _table(f"{CONCURRENT} at a time, {TOKENS} tokens each", RATES, numbers),
            _table(f"One at a time, {TOKENS} tokens each", TIMES, numbers),
        ],
        details={"handle": dict(found)},
        notes=[
            "handle: Serve with its settings for throughput; handle-default: without",
            "the client's answers are parsed, the chunks that a handle yields are not",
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
    rows: list[list[ReportCell]] = [
        [name, *(of_one[key] for key in columns)] for name, of_one in numbers.items()
    ]
    return Table(title, ("caller", *columns.values()), rows)
