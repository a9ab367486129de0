"""``tandem models``, and the building of what ``up`` needs."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.config import TandemConfig
from cluster.models import store
from cluster.models.build import build as build_models
from cluster.models.store import CATALOGUE, BuildError, list_models, manifest

_TEXT = TextColumn("{task.description}", markup=False)


def build_missing(console: Console, config: TandemConfig) -> None:
    """Build those default models that ``config`` names and that are not built."""
    named = config.model_files
    missing = [n for n, model in CATALOGUE.items() if n in named and manifest(model) is None]
    if missing:
        console.print(f"building {', '.join(missing)}; this is done once")
        _build(console, missing, force=False)


def build(names: Sequence[str] | None, *, force: bool) -> None:
    """``tandem models build``."""
    _build(Console(), names, force=force)


def show(*, as_json: bool) -> None:
    """``tandem models list``."""
    rows = list_models()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, default=str))
        return
    table = Table("model", "kind", "built", "MiB", "facts", "where", box=None)
    for row in rows:
        facts = ", ".join(f"{name} {value}" for name, value in row.facts.items())
        size = f"{row.size_bytes / 2**20:.0f}" if row.built else ""
        table.add_row(row.name, row.kind, "yes" if row.built else "no", size, facts, str(row.path))
    Console().print(table)


def _build(console: Console, names: Sequence[str] | None, *, force: bool) -> None:
    with reported(console) as progress:
        built = build_models(names, force=force, progress=progress)
    for model in built:
        facts = ", ".join(f"{name} {value}" for name, value in model.facts.items())
        how = f"built in {model.build_s:.0f} s" if model.fresh else "was built already"
        console.print(f"{model.name}: {how}{f' ({facts})' if facts else ''}", highlight=False)
    if not built:
        raise BuildError("there is nothing to build")


@contextmanager
def reported(console: Console) -> Iterator[store.Progress]:
    """A progress bar that is gone at the end; without a terminal, a line for each new step."""
    columns = SpinnerColumn(), _TEXT, BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Reporter(console, progress)


class _Reporter:
    """Moves one progress bar; without a terminal, prints each new step."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("models", total=None)
        self._said = ""

    def __call__(self, message: str, fraction: float | None) -> None:
        self._progress.update(
            self._task,
            description=message,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )
        if not self._console.is_terminal and message != self._said:
            self._said = message
            self._console.print(message, highlight=False)
