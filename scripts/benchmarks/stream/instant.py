"""How many streams a second each path carries when the engine itself takes no time."""

import argparse
from collections import defaultdict
from collections.abc import Callable

from benchmarks import load
from benchmarks.report import Cell as ReportCell
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.stream.cell import TOKENS, Cell, chat, measure
from benchmarks.stream.costs import cost_table
from benchmarks.stream.paths import (
    BARE,
    CLUSTER,
    SERVE_DEFAULT,
    SERVE_HANDLE,
    TARGETS,
    VLLM_ROUTER,
    say,
)

HEADLINE = 32
"""Connections of the keys that carry no number."""

RATIOS = {
    "ratio_vs_bare": (BARE, 1.0),
    "ratio_vs_serve_handle": (SERVE_HANDLE, 6.0),
    "ratio_vs_serve_default": (SERVE_DEFAULT, 30.0),
    "ratio_vs_vllm_router": (VLLM_ROUTER, 1.0),
}
"""Keys, the peers that the cluster is compared with, and the ratios to reach."""


Cells = dict[tuple[str, int], list[Cell]]
"""The rounds of each path and number of connections."""


def run(args: argparse.Namespace) -> Report:
    """Measure every path in every round."""
    cells: Cells = defaultdict(list)
    for number, name in interleaved(args.targets, args.rounds):
        with TARGETS[name](0.0) as running:
            request = chat(running.endpoint)
            size = load.answer_size(running.endpoint, request, TOKENS)
            for connections in args.connections:
                cell = measure(running, request, size, connections, args.seconds)
                cells[name, connections].append(cell)
                say(number, name, f"{connections:>4} connections {cell.req_s:8.1f} req/s")
    return _report(cells, args.connections)


def _report(cells: Cells, connections: list[int]) -> Report:
    keys: dict[str, Summary] = {}
    for number in sorted(connections, key=lambda number: number != HEADLINE):
        suffix = "" if number == HEADLINE else f"_at_{number}"
        keys |= {f"{name}{suffix}": value for name, value in _keys(cells, number).items()}
    return Report(
        keys=keys,
        goals={key: f">= {goal:g}" for key, (_, goal) in RATIOS.items() if key in keys},
        tables=[
            _rates(cells, connections),
            _times(cells, connections),
            *(_costs(cells, number) for number in connections),
        ],
        details={"instant": {f"{name} at {n}": rounds for (name, n), rounds in cells.items()}},
        notes=[_note(cells)],
    )


def _of(rounds: list[Cell], number: Callable[[Cell], float]) -> Summary:
    return Summary(tuple(map(number, rounds)))


def _rate(cell: Cell) -> float:
    return cell.req_s


def _keys(cells: Cells, connections: int) -> dict[str, Summary]:
    ours = cells.get((CLUSTER, connections))
    if not ours:
        return {}
    keys = {"router_req_s": _of(ours, _rate)}
    for key, (peer, _) in RATIOS.items():
        if theirs := cells.get((peer, connections)):
            keys[key] = _of(ours, _rate).over(_of(theirs, _rate))
    return {**keys, "cpu_us_per_token": _of(ours, lambda cell: sum(cell.cpu_us_per_token.values()))}


def _rates(cells: Cells, connections: list[int]) -> Table:
    names = dict.fromkeys(name for name, _ in cells)
    rows: list[list[ReportCell]] = [
        [name, *(_of(cells[name, n], _rate) for n in connections)] for name in names
    ]
    columns = ("path", *(f"{number} connections" for number in connections))
    return Table(f"Streams of {TOKENS} tokens a second, instant engine", columns, rows)


def _times(cells: Cells, connections: list[int]) -> Table:
    names = dict.fromkeys(name for name, _ in cells)
    rows: list[list[ReportCell]] = [
        [name, *(_of(cells[name, n], pick) for n in connections for pick in (_p50, _p99))]
        for name in names
    ]
    columns = [f"{number}: {which}" for number in connections for which in ("p50", "p99")]
    return Table("Time of a whole stream in ms", ("path", *columns), rows)


def _p50(cell: Cell) -> float:
    return cell.load.p50_ms


def _p99(cell: Cell) -> float:
    return cell.load.p99_ms


def _costs(cells: Cells, connections: int) -> Table:
    title = f"CPU us for a token, instant engine, {connections} connections"
    return cost_table(
        title,
        {
            name: [cell.cpu_us_per_token for cell in rounds]
            for (name, number), rounds in cells.items()
            if number == connections
        },
    )


def _note(cells: Cells) -> str:
    shares = [cell.client_share for rounds in cells.values() for cell in rounds]
    return (
        f"the load is wrk with one thread, which took {min(shares):.0%} to {max(shares):.0%} of a "
        f"core; the servers ran one at a time, and the cluster asked for an API key"
    )
