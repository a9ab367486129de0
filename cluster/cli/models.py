"""``tandem models build`` and ``list``, and the builds before ``tandem up``."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.config import TandemConfig
from cluster.errors import BuildError
from cluster.models import store
from cluster.models.build import build as build_models
from cluster.models.store import CATALOGUE, list_models, manifest

_TEXT = TextColumn("{task.description}", markup=False)


def build_missing(console: Console, config: TandemConfig) -> None:
    """Build the default models that ``config`` uses and that do not exist yet."""
    used = config.model_files
    missing = [n for n, model in CATALOGUE.items() if n in used and manifest(model) is None]
    if missing:
        console.print(f"building {', '.join(missing)} (first start only)")
        _build(console, missing, force=False)


def build(names: Sequence[str] | None, *, force: bool) -> None:
    """Build default models; None builds all."""
    _build(Console(), names, force=force)


def show(*, as_json: bool) -> None:
    """Print the default models and their state."""
    rows = list_models()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, default=str))
        return
    table = Table("model", "kind", "built", "MiB", "facts", "directory", box=None)
    for row in rows:
        facts = ", ".join(f"{name} {value}" for name, value in row.facts.items())
        size = f"{row.size_bytes / 2**20:.0f}" if row.built else ""
        table.add_row(row.name, row.kind, "yes" if row.built else "no", size, facts, str(row.path))
    Console().print(table)


def _build(console: Console, names: Sequence[str] | None, *, force: bool) -> None:
    with show_progress(console) as progress:
        built = build_models(names, force=force, progress=progress)
    for model in built:
        facts = ", ".join(f"{name} {value}" for name, value in model.facts.items())
        action = f"built in {model.build_s:.0f} s" if model.fresh else "already built"
        console.print(f"{model.name}: {action}{f' ({facts})' if facts else ''}", highlight=False)
    if not built:
        raise BuildError("nothing to build")


@contextmanager
def show_progress(console: Console) -> Iterator[store.Progress]:
    """Show a transient progress bar; without a terminal, print a line per step."""
    columns = SpinnerColumn(), _TEXT, BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Reporter(console, progress)


class _Reporter:
    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("models", total=None)
        self._last_message = ""

    def __call__(self, message: str, fraction: float | None) -> None:
        self._progress.update(
            self._task,
            description=message,
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )
        if not self._console.is_terminal and message != self._last_message:
            self._last_message = message
            self._console.print(message, highlight=False)
