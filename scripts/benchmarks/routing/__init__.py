"""Routing: the time that a decision takes, and what the decisions are worth on traces.

No cluster: the policies are pure. First every policy's decisions are timed, with 256 replicas and
a million blocks in the index: every replica has requests under way, and prompts share prefixes of
every length. What a decision is made by is changed between two decisions, as it is in a router;
that is not part of the time. Then the simulator serves traces with our policies, those of other
routers, and an oracle; each round has other seeds.

With ``--live`` instead: a cluster of simulated engines with each policy beside the simulator.
"""

import argparse

from benchmarks.report import Report
from benchmarks.routing import decisions, live, traces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench routing``."""
    parser.add_argument("--only", choices=("decisions", "traces"), help="one part of it")
    decisions.add_arguments(parser)
    traces.add_arguments(parser)
    live.add_arguments(parser)


def run(args: argparse.Namespace) -> Report:
    """Both parts, or the live one."""
    if args.live is not None:
        return live.run(args)
    report = Report(keys={})
    if args.only != "traces":
        report = report.joined(decisions.run(args))
    if args.only != "decisions":
        report = report.joined(traces.run(args))
    return report
