"""The time that a decision takes, with 256 replicas and a million blocks in the index.

One process and one core, no cluster: the policies are pure. Every replica has requests under way,
and prompts share prefixes of every length. What a decision is made by is changed between two
decisions, as it is in a router; that is not part of the time.
"""

import argparse

from benchmarks.report import Report
from benchmarks.routing import decisions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench routing``."""
    decisions.add_arguments(parser)


def run(args: argparse.Namespace) -> Report:
    """Measure every policy's decisions."""
    return decisions.run(args)
