"""Streams: throughput of an instant engine, latency, CPU time, capacity and memory at its pace.

The servers run one after the other, each alone on the machine, all of them in every round.
"""

import argparse

from benchmarks.report import Report
from benchmarks.stream import capacity, cost, idle, instant, paced
from benchmarks.stream.targets import TARGETS, prepare
from benchmarks.wrk import require_wrk

PARTS = {
    "instant": instant.run,
    "paced": paced.run,
    "cost": cost.run,
    "capacity": capacity.run,
    "idle": idle.run,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS), help="parts")
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="servers"
    )
    parser.add_argument(
        "--connections", nargs="+", type=int, default=[1, 32, 256], help="concurrent streams"
    )
    points = [point.name for point in cost.POINTS.values()]
    parser.add_argument(
        "--points", nargs="+", choices=points, default=points, help="streams of the part cost"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each measurement")


def run(args: argparse.Namespace) -> Report:
    """Measure all parts, or the chosen ones."""
    require_wrk()
    prepare(args.targets)
    if args.quick:
        args.seconds = min(args.seconds, 2.0)
    report = Report({})
    for part in args.part:
        report = report.joined(PARTS[part](args))
    return report
