"""Streams of an instant engine through the cluster and through its peers; and a paced engine's.

The servers run one after the other, each alone on the machine, all of them in every round.
"""

import argparse

from benchmarks.load import require_wrk
from benchmarks.report import Report
from benchmarks.stream import instant, paced
from benchmarks.stream.paths import TARGETS, prepare

PARTS = ("instant", "paced")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench stream``."""
    parser.add_argument("--part", choices=PARTS, help="of the two engines that one alone")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=6.0, help="of load in each cell")


def run(args: argparse.Namespace) -> Report:
    """Measure both parts, or the one that was asked for."""
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
