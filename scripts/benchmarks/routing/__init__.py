"""Time per routing decision, and cache hits and latency of routing policies on traces.

No cluster is needed. The first part times every policy's decisions with 256 replicas and a million
blocks in the prefix index: every replica has requests in flight, and prompts share prefixes of all
lengths. Updates of this state between two decisions are not timed. The second part simulates traces
with our policies, those of other routers, and an oracle; each round has other seeds.

``--live`` instead runs each policy on a cluster of simulated engines and compares the results with
the simulator's.
"""

import argparse

from benchmarks.report import Report
from benchmarks.routing import decisions, live, traces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("decisions", "traces"), help="run only one part")
    decisions.add_arguments(parser)
    traces.add_arguments(parser)
    live.add_arguments(parser)


def run(args: argparse.Namespace) -> Report:
    """Run both parts, or the live comparison."""
    if args.live is not None:
        return live.run(args)
    report = Report(keys={})
    if args.only != "traces":
        report = report.joined(decisions.run(args))
    if args.only != "decisions":
        report = report.joined(traces.run(args))
    return report
