"""Time per routing decision, and cache hits and latency of routing policies on traces.

No cluster is needed. The first part times every policy's decisions with 256 replicas and a million
blocks in the prefix index: every replica has requests in flight, and prompts share prefixes of all
lengths. Updates of this state between two decisions are not timed. The second part simulates traces
with our policies, those of other routers, and an oracle; each round has other seeds. The third part
compares our default policy with tuned peers on seeds that tuned no policy.

``--live`` instead runs each policy on a cluster of simulated engines and compares the results with
the simulator's.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.report import Report
from benchmarks.routing import decisions, held_out, live, traces

PARTS: Mapping[str, Any] = {"decisions": decisions, "traces": traces, "held-out": held_out}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS, help="run only one part")
    decisions.add_arguments(parser)
    traces.add_arguments(parser)
    live.add_arguments(parser)


def run(args: argparse.Namespace) -> Report:
    """Run all parts or one, or the live comparison."""
    if args.live is not None:
        return live.run(args)
    if args.quick:
        args.trace_s = min(args.trace_s, 120.0)
    report = Report(keys={})
    for name, part in PARTS.items():
        if args.only in (None, name):
            report = report.joined(part.run(args))
    return report
