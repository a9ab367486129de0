"""Memory of the router's process under idle, active and stalled streams.

Each load has a cluster of its own, so that no peak hides behind an earlier one. The clients come
through HAProxy. What they do:

- idle: 1,000 streams are open; each has had its first token, and the next one is seconds away;
- active: 256 streams get a token every 20 ms, and ask again when their answer is whole;
- stalled: 100 clients ask for several megabytes each and never read a byte.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass

from benchmarks.memory.loads import LOADS
from benchmarks.memory.watch import Memory, Watch, process_of
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.stream.paths import say
from benchmarks.targets.running import MODEL
from benchmarks.targets.tandem import tandem_of

GOAL = "<= 250"
HEADLINE = "router_rss_mb_256_active"


@dataclass(frozen=True, slots=True)
class Cell:
    """One load in one round."""

    before: Memory
    """Of a cluster that has answered one request, and has no client."""
    peak: Memory
    said: str
    """What the load reports of itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench memory``."""
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--seconds", type=float, default=10.0, help="that each load is watched")


def run(args: argparse.Namespace) -> Report:
    """Put each load on a cluster of its own, in every round."""
    if args.quick:
        args.seconds = min(args.seconds, 3.0)
    cells: dict[str, list[Cell]] = defaultdict(list)
    for number, name in interleaved(args.loads, args.rounds):
        cell = _cell(name, args.seconds)
        cells[name].append(cell)
        say(number, name, f"{cell.before.rss_mb:.0f} MB before, {cell.peak.rss_mb:.0f} MB at most")
    return _report(cells)


def _cell(name: str, seconds: float) -> Cell:
    load = LOADS[name]
    with tandem_of({"generators": [load.generator]}, MODEL) as running:
        router = process_of(running.home.path, "router")
        before = Memory.of(router)
        with Watch(router) as watch:
            said = load.put(running.endpoint, seconds)
        return Cell(before, watch.peak, said)


def _report(cells: dict[str, list[Cell]]) -> Report:
    before = [cell.before for rounds in cells.values() for cell in rounds]
    found = {"idle_cluster": before}
    found |= {name: [cell.peak for cell in rounds] for name, rounds in cells.items()}
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
        tables=[Table("The router's process at its peak, in MB", ("load", "RSS", "PSS"), rows)],
        details={"memory": dict(cells)},
        notes=[f"{name.replace('_', ' ')}: {rounds[-1].said}" for name, rounds in cells.items()],
    )
