"""Streaming throughput with an instant engine and latency with a paced one, for all peers.

The servers run one after the other, each alone on the machine, all of them in every round.
"""

import argparse

from benchmarks.report import Report
from benchmarks.stream import instant, paced
from benchmarks.stream.targets import TARGETS, prepare
from benchmarks.wrk import require_wrk

PARTS = ("instant", "paced")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, help="measure with one kind of engine only")
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="servers"
    )
    parser.add_argument(
        "--connections", nargs="+", type=int, default=[1, 32, 256], help="concurrent streams"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each measurement")


def run(args: argparse.Namespace) -> Report:
    """Measure with both engines, or with the chosen one."""
    require_wrk()
    prepare(args.targets)
    if args.quick:
        args.seconds = min(args.seconds, 2.0)
    report = Report({})
    if args.part != "paced":
        report = report.joined(instant.run(args))
    if args.part != "instant":
        report = report.joined(paced.run(args))
    return report
