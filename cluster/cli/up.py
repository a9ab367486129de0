"""``tandem up``: models, start, and the wait until Ctrl-C."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from cluster.cli.down import describe
from cluster.cli.models import build_missing
from cluster.cli.paths import load_config
from cluster.cli.progress import StartProgress
from cluster.cli.recipes import print_recipes
from cluster.config import TandemConfig
from cluster.errors import StartError
from cluster.launch import processes
from cluster.launch.start import Started, start
from cluster.launch.stop import stop
from cluster.models.store import home, resolve

ATTACHED_DRAIN_S = 10.0
WATCH_S = 0.5


def run(config: Path | None, overrides: Sequence[str], *, detach: bool, monitoring: bool) -> None:
    """Start a cluster; return once it is healthy, or stay until a signal ends it.

    Raises:
        ConfigError: before anything starts.
        StartError: nothing that was started is left.
    """
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)
    console = Console()
    loaded = load_config(config, overrides)
    build_missing(console, loaded.config)
    _check_models(loaded.config)
    with StartProgress(console) as progress:
        started = start(loaded, home(), progress.show, monitoring=monitoring)
    _print_phases(console, started)
    print_recipes(console, loaded.config, started.state)
    if not detach:
        _stay(console)


def _check_models(config: TandemConfig) -> None:
    """Raise ConfigError where a model's directory is not there, before anything starts."""
    for path in config.model_files:
        resolve(path)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_phases(console: Console, started: Started) -> None:
    phases = started.phases
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.seconds.items())
    console.print(
        f"healthy after {phases.total_s:.1f} s ({parts})", highlight=False, soft_wrap=True
    )


def _stay(console: Console) -> None:
    console.print("\nCtrl-C ends it.", style="bold")
    try:
        while processes.has_head(processes.find(home())):
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        console.print("ending; Ctrl-C again does not wait for running requests")
    else:
        if not processes.find(home()):  # `tandem down` elsewhere
            console.print("the cluster was ended")
            return
        stop(home(), drain_s=0)
        raise StartError("Ray died; what was left of the cluster has been ended")
    try:
        stopped = stop(home(), drain_s=ATTACHED_DRAIN_S)
    except KeyboardInterrupt:
        stopped = stop(home(), drain_s=0)
    console.print(describe(stopped))
