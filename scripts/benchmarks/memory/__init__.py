"""Memory of the router process with idle, active and stalled streams.

Each load runs on a separate cluster, so that an earlier peak does not hide a later one. The clients
connect through HAProxy:

- idle: 1,000 open streams; each has had its first token, and the next one is seconds away;
- active: 256 streams with a token every 20 ms; a finished stream is followed by the next one;
- stalled: 100 clients that request several megabytes each and never read.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass

from benchmarks.memory.loads import LOADS
from benchmarks.processes import PeakMemory, ProcessMemory, find_process
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.targets.running import SIM_MODEL
from benchmarks.targets.tandem import tandem_with_pools

GOAL = "<= 250"
HEADLINE = "router_rss_mb_256_active"


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """One load in one round."""

    before: ProcessMemory
    """Memory after one request, without a client."""
    peak: ProcessMemory
    said: str
    """Description of the load."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loads", nargs="+", choices=list(LOADS), default=list(LOADS), help="loads to measure"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load")


def run(args: argparse.Namespace) -> Report:
    """Run each load on a new cluster, in every round."""
    if args.quick:
        args.seconds = min(args.seconds, 3.0)
    results: dict[str, list[MemoryResult]] = defaultdict(list)
    for number, name in interleave(args.loads, args.rounds):
        result = _measure(name, args.seconds)
        results[name].append(result)
        print_progress(
            number, name, f"{result.before.rss_mb:.0f} MB before, peak {result.peak.rss_mb:.0f} MB"
        )
    return _report(results)


def _measure(name: str, seconds: float) -> MemoryResult:
    load = LOADS[name]
    with tandem_with_pools({"generators": [load.generator]}, SIM_MODEL) as running:
        router = find_process(running.home.path, "router")
        before = ProcessMemory.read(router)
        with PeakMemory(router) as memory:
            description = load.run(running.endpoint, seconds)
        return MemoryResult(before, memory.peak, description)


def _report(results: dict[str, list[MemoryResult]]) -> Report:
    before = [result.before for rounds in results.values() for result in rounds]
    found = {"idle_cluster": before}
    found |= {name: [result.peak for result in rounds] for name, rounds in results.items()}
    keys: dict[str, Summary] = {}
    rows: list[tuple[str, Summary, Summary]] = []
    for name, memories in found.items():
        rss = Summary(tuple(memory.rss_mb for memory in memories))
        pss = Summary(tuple(memory.pss_mb for memory in memories))
        keys |= {f"router_rss_mb_{name}": rss, f"router_pss_mb_{name}": pss}
        rows.append((name.replace("_", " "), rss, pss))
    return Report(
        keys=keys,
        goals={HEADLINE: GOAL} if HEADLINE in keys else {},
        tables=[Table("Peak memory of the router process in MB", ("load", "RSS", "PSS"), rows)],
        details={"memory": dict(results)},
        notes=[f"{name.replace('_', ' ')}: {rounds[-1].said}" for name, rounds in results.items()],
    )
