"""Streams of an instant engine through the cluster and through its peers."""

import argparse

from benchmarks.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench stream``."""


def run(args: argparse.Namespace) -> Report:
    """Measure."""
    return Report({})
