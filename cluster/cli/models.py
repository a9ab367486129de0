"""``tandem models build``, ``fetch`` and ``list``."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.cli.defaults import load_config
from cluster.config import TandemConfig
from cluster.errors import BuildError
from cluster.models import store
from cluster.models.build import build as build_models
from cluster.models.hub import download
from cluster.models.store import CATALOGUE, list_models, manifest

_TEXT = TextColumn("{task.description}", markup=False)


def missing_models(config: TandemConfig) -> list[str]:
    """Return the default models that ``config`` uses and that are not built."""
    used = config.model_files
    return [n for n, model in CATALOGUE.items() if n in used and manifest(model) is None]


def show(*, as_json: bool) -> None:
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


def build(
    names: Sequence[str] | None, console: Console | None = None, *, force: bool = False
) -> None:
    """Build default models and print the result; None builds all."""
    console = console or Console()
    with show_progress(console) as progress:
        built = build_models(names, force=force, progress=progress)
    for model in built:
        facts = ", ".join(f"{name} {value}" for name, value in model.facts.items())
        action = f"built in {model.build_s:.0f} s" if model.fresh else "already built"
        line = f"{model.name}: {action}{f' ({facts})' if facts else ''}"
        console.print(line, highlight=False, soft_wrap=True)
    if not built:
        raise BuildError("nothing to build")


def fetch(path: Path | None, overrides: Sequence[str]) -> None:
    """Build or download every model of a configuration that is not on this machine yet."""
    console = Console()
    config = load_config(path, overrides).config
    if missing := missing_models(config):
        build(missing, console)
    for model in config.model_files:
        directory = store.resolve(model)
        if not Path(directory).is_dir():
            directory = download(directory)
        console.print(f"{model}: {directory}", highlight=False, soft_wrap=True)


@contextmanager
def show_progress(console: Console) -> Iterator[store.Progress]:
    """Show a transient progress bar; without a terminal, print a line per step."""
    columns = SpinnerColumn(), _TEXT, BarColumn(), TimeElapsedColumn()
    last_message = ""
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("models", total=None)

        def report(message: str, fraction: float | None) -> None:
            nonlocal last_message
            total = None if fraction is None else 1.0
            progress.update(task, description=message, total=total, completed=fraction or 0.0)
            if not console.is_terminal and message != last_message:
                last_message = message
                console.print(message, highlight=False)

        yield report
