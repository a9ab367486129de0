"""``tandem up`` and ``tandem down``."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.cli.background_builds import BackgroundBuilds
from cluster.cli.defaults import load_config
from cluster.cli.progress import StartProgress
from cluster.cli.recipes import print_join, print_recipes
from cluster.errors import ConfigError, StartError
from cluster.launch import processes, state
from cluster.launch.gpus import check_gpus_fit, count_gpus, gpu_settings
from cluster.launch.join import JoinOptions
from cluster.launch.join import join as run_join
from cluster.launch.ports import check_node_address
from cluster.launch.redis import HEAD_TIMEOUT_S
from cluster.launch.start import StartResult, start
from cluster.launch.stop import StopResult, stop
from cluster.models.store import CATALOGUE, home, resolve

ATTACHED_DRAIN_S = 10.0  # after Ctrl-C
POLL_S = 0.5


def up(
    config: Path | None,
    overrides: Sequence[str],
    *,
    detach: bool,
    monitoring: bool,
    address: str | None,
    redis: str | None,
) -> None:
    """Start a cluster, and unless ``detach`` is set stay until a signal stops it.

    Raises:
        ConfigError: the configuration is invalid; nothing was started.
        StartError: the start failed; everything was stopped again.
    """
    processes.interrupt_on_termination()
    console = Console()
    loaded = load_config(config, overrides, address=address)
    num_gpus = count_gpus()
    if settings := gpu_settings(loaded.config, num_gpus):
        loaded = load_config(config, [*overrides, *settings], address=address)
        console.print(f"GPUs: {' '.join(settings)}", highlight=False, soft_wrap=True)
    if address is None:  # other nodes may have the GPUs
        check_gpus_fit(loaded.config, num_gpus)
    for model in loaded.config.model_files:
        if model not in CATALOGUE:
            resolve(model)  # raises ConfigError if it does not exist
    if address is not None:  # before the start, which may wait for the other nodes
        print_join(console, f"{address}:{loaded.config.cluster.ray_port}", home())
    with BackgroundBuilds(loaded.config) as builds:
        if builds.names:
            names = ", ".join(builds.names)
            text = f"building {names} during the start (first start only)"
            console.print(text, highlight=False, soft_wrap=True)
        try:
            with StartProgress(console) as progress:
                started = start(
                    loaded,
                    home(),
                    lambda phase, application: progress.show(phase, application, builds.check()),
                    monitoring=monitoring,
                    address=address,
                    redis=redis,
                )
        except StartError as error:
            if unfinished := builds.check():
                raise StartError(
                    f"{error}. Models were still being built: {', '.join(unfinished)}. Build them "
                    "first with `tandem models fetch`, or raise cluster.ready_timeout_s."
                ) from None
            raise
        builds.finish(console)
    _print_duration(console, "healthy", started)
    print_recipes(console, loaded.config, started.state)
    if not detach:
        _stay(console, is_head=True, cluster_continues=redis is not None)


def join(options: JoinOptions, *, detach: bool) -> None:
    """Join a cluster, and unless ``detach`` is set stay until a signal makes this node leave.

    Raises:
        StartError: the join failed; everything was stopped again.
    """
    processes.interrupt_on_termination()
    console = Console()
    with StartProgress(console) as progress:
        joined = run_join(options, home(), progress.show)
    _print_duration(console, "joined", joined)
    http = f"{joined.state.http_url} as soon as a replica runs on this node"
    console.print(f"\nHTTP       {http}", highlight=False)
    console.print(f"dashboard  {joined.state.dashboard_url}", highlight=False)
    if not detach:
        _stay(console, is_head=False, cluster_continues=True)


def _print_duration(console: Console, result: str, started: StartResult) -> None:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in started.phases.items())
    text = f"{result} after {sum(started.phases.values()):.1f} s ({parts})"
    console.print(text, highlight=False, soft_wrap=True)


def head_address(address: str | None) -> str:
    """Return ``address``, or by default this machine's address on its default route.

    Raises:
        ConfigError: the address is not usable by other nodes.
    """
    if address is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing (RFC 5737)
            except OSError:
                raise ConfigError("this machine has no default route; pass --address") from None
            address = str(probe.getsockname()[0])
    check_node_address(address)
    return address


def _stay(console: Console, *, is_head: bool, cluster_continues: bool) -> None:
    action = "leave the cluster" if cluster_continues else "stop"
    console.print(f"\nPress Ctrl-C to {action}.", style="bold")
    try:
        while state.is_alive(processes.find(home()), state.load(home())):
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        again = "; press Ctrl-C again to cancel running requests"
        console.print("leaving the cluster" if cluster_continues else f"stopping{again}")
    else:
        if not processes.find(home()):  # `tandem down` in another terminal
            console.print("the cluster was stopped" if is_head else "this node left the cluster")
            return
        stop(home(), drain_s=0)
        if is_head:
            rest = "this node" if cluster_continues else "the cluster"
            raise StartError(f"Ray died; the rest of {rest} has been stopped")
        raise StartError(
            "Ray ended on this node, because the head stopped, did not respond for a minute (with "
            f"Redis: {HEAD_TIMEOUT_S / 60:g} minutes), or the node was drained; the rest of the "
            "node has been stopped. Join again with `tandem join`."
        )
    try:
        stopped = stop(home(), drain_s=ATTACHED_DRAIN_S)
    except KeyboardInterrupt:
        stopped = stop(home(), drain_s=0)
    console.print(describe_stop(stopped))


def down(drain_s: float, *, head_only: bool) -> None:
    """Stop the cluster; with ``head_only``, end the head of a cluster whose state is in Redis.

    Raises:
        StartError: a process cannot be ended, or the other nodes cannot continue.
    """
    known = state.load(home())
    if head_only and (known is None or known.redis is None):
        raise StartError("--head-only needs a head that was started with `tandem up --redis`")
    console = Console()
    with console.status("stopping the cluster"):
        stopped = stop(home(), drain_s=drain_s, end_cluster=not head_only)
    console.print(describe_stop(stopped))


def describe_stop(stopped: StopResult | None) -> str:
    if stopped is None:
        return "No cluster is running."
    number = stopped.ended.terminated + stopped.ended.killed
    requests = "all requests finished" if stopped.drained else "did not wait for running requests"
    if stopped.cluster_continues:
        requests = "this node left, and the cluster goes on"
    return f"Stopped {number} processes in {stopped.seconds:.1f} s; {requests}."
