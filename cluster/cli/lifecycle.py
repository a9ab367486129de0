"""``tandem up`` and ``tandem down``."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.cli.defaults import load_config
from cluster.cli.models import build_missing
from cluster.cli.progress import StartProgress
from cluster.cli.recipes import print_recipes
from cluster.errors import StartError
from cluster.launch import processes
from cluster.launch.gpus import check_gpus_fit, count_gpus, gpu_settings
from cluster.launch.start import start
from cluster.launch.stop import StopResult, stop
from cluster.models.store import home, resolve

ATTACHED_DRAIN_S = 10.0  # after Ctrl-C
POLL_S = 0.5


def up(config: Path | None, overrides: Sequence[str], *, detach: bool, monitoring: bool) -> None:
    """Start a cluster, and unless ``detach`` is set stay until a signal stops it.

    Raises:
        ConfigError: the configuration is invalid; nothing was started.
        StartError: the start failed; everything was stopped again.
    """
    processes.interrupt_on_termination()
    console = Console()
    loaded = load_config(config, overrides)
    num_gpus = count_gpus()
    if settings := gpu_settings(loaded.config, num_gpus):
        loaded = load_config(config, [*overrides, *settings])
        console.print(f"GPUs: {' '.join(settings)}", highlight=False, soft_wrap=True)
    check_gpus_fit(loaded.config, num_gpus)
    build_missing(console, loaded.config)
    for model in loaded.config.model_files:
        resolve(model)  # raises ConfigError if it does not exist
    with StartProgress(console) as progress:
        started = start(loaded, home(), progress.show, monitoring=monitoring)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in started.phases.items())
    text = f"healthy after {sum(started.phases.values()):.1f} s ({parts})"
    console.print(text, highlight=False, soft_wrap=True)
    print_recipes(console, loaded.config, started.state)
    if not detach:
        _stay(console)


def _stay(console: Console) -> None:
    console.print("\nPress Ctrl-C to stop.", style="bold")
    try:
        while processes.has_head(processes.find(home())):
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print("stopping; press Ctrl-C again to cancel running requests")
    else:
        if not processes.find(home()):  # `tandem down` in another terminal
            console.print("the cluster was stopped")
            return
        stop(home(), drain_s=0)
        raise StartError("Ray died; the rest of the cluster has been stopped")
    try:
        stopped = stop(home(), drain_s=ATTACHED_DRAIN_S)
    except KeyboardInterrupt:
        stopped = stop(home(), drain_s=0)
    console.print(describe_stop(stopped))


def down(drain_s: float) -> None:
    console = Console()
    with console.status("stopping the cluster"):
        stopped = stop(home(), drain_s=drain_s)
    console.print(describe_stop(stopped))


def describe_stop(stopped: StopResult | None) -> str:
    if stopped is None:
        return "No cluster is running."
    number = stopped.ended.terminated + stopped.ended.killed
    requests = "all requests finished" if stopped.drained else "did not wait for running requests"
    return f"Stopped {number} processes in {stopped.seconds:.1f} s; {requests}."
