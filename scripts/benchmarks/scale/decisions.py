"""Part 1 of ``bench scale``: microseconds per decision, and memory of the prefix index."""

import argparse
import gc
from collections import defaultdict

import numpy as np
import psutil

from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.routing.decisions import (
    DEFAULT_POLICY,
    LoadedFleet,
    time_decisions,
    time_full_decisions,
)

NUM_REPLICAS = (10, 100, 1000)
MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decisions", type=int, default=5000, help="decisions per number of replicas and round"
    )
    parser.add_argument("--blocks", type=int, default=2**20, help="blocks in the prefix index")


def run(args: argparse.Namespace) -> Report:
    """Time the default policy's decisions at each number of replicas, in every round."""
    if args.quick:
        args.decisions, args.blocks = min(args.decisions, 500), min(args.blocks, 2**16)
    rows: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for number in range(args.rounds):
        for replicas in NUM_REPLICAS:
            before = psutil.Process().memory_info().rss
            loaded = LoadedFleet(replicas, args.blocks, seed=number)
            memory_mb = (psutil.Process().memory_info().rss - before) / MB
            choice = time_decisions(loaded, DEFAULT_POLICY, args.decisions)
            full = time_full_decisions(loaded, args.decisions)
            row = *np.percentile(choice, (50, 99)), *np.percentile(full, (50, 99)), memory_mb
            rows[replicas].append(tuple(map(float, row)))
            print_progress(
                number, f"{replicas} replicas", f"p50 {row[0]:.1f} µs, {memory_mb:.0f} MB"
            )
            del loaded
            gc.unfreeze()
            gc.collect()
    return _report(rows, args)


def _report(rows: dict[int, list[tuple[float, ...]]], args: argparse.Namespace) -> Report:
    columns = {n: [Summary(column) for column in zip(*r, strict=True)] for n, r in rows.items()}
    keys = {f"decision_us_p50_{n}_replicas": found[0] for n, found in columns.items()}
    keys |= {f"decision_full_us_p50_{n}_replicas": found[2] for n, found in columns.items()}
    titles = ("replicas", "choice p50", "p99", "with hashing and bookkeeping p50", "p99", "MB")
    title = f"CPU µs per decision of `{DEFAULT_POLICY}`, {args.blocks:,} blocks in the index"
    return Report(
        keys=keys,
        tables=[Table(title, titles, [(f"{n:,}", *found) for n, found in columns.items()])],
        details={"decisions": dict(rows)},
        notes=[
            "MB is the growth of the process by the fleet and the index. A later fleet may reuse "
            "the memory of an earlier one."
        ],
    )
