"""The table of CPU time for a token, by the parts of each path."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks import cpu
from benchmarks.report import Cell, Table

PARTS = ("haproxy", "proxy", "router", "ingress", "engine", cpu.REST)

Costs = Mapping[str, Sequence[Mapping[str, float]]]
"""Of each path, round by round: microseconds of CPU for a token, by part."""


def cost_table(title: str, costs: Costs) -> Table:
    """Means over the rounds."""
    rows = [_row(name, rounds) for name, rounds in costs.items()]
    return Table(title, ("path", *PARTS, "all"), rows)


def _row(name: str, rounds: Sequence[Mapping[str, float]]) -> list[Cell]:
    means = [fmean(costs.get(part, 0.0) for costs in rounds) for part in PARTS]
    return [name, *(mean or None for mean in means), sum(means)]
