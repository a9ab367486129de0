"""Growth with routers and replicas: CPU time per token and decision, memory, policies.

Three parts: ``decisions`` times routing decisions with 10, 100 and 1,000 replicas; ``simulated``
runs the policies on 1,000 replicas in the simulator; ``live`` starts clusters of 1 to 4 routers and
8 to 64 replicas of the simulated engine. It measures the CPU time per token of each kind of process
while each replica has 8 streams with a token every 50 ms, the CPU time without requests, and the
memory of a router. The largest cluster takes minutes to start.
"""

import argparse

from benchmarks.report import Report
from benchmarks.scale import decisions, live, simulated

PARTS = {"decisions": decisions.run, "simulated": simulated.run, "live": live.run}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=list(PARTS), help="parts")
    decisions.add_arguments(parser)
    simulated.add_arguments(parser)
    live.add_arguments(parser)


def run(args: argparse.Namespace) -> Report:
    """Run all parts, or the chosen ones."""
    report = Report({})
    for part in args.part:
        report = report.joined(PARTS[part](args))
    return report
