"""Processes of a cluster: found by an environment variable, and ended.

Ray's workers, HAProxy and the engines inherit ``TANDEM_CLUSTER_ID`` even when their parent has
died, so they are found after any crash.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from cluster.errors import StartError

CLUSTER_ID = "TANDEM_CLUSTER_ID"
HOME = "TANDEM_HOME"
HEAD, NODE = frozenset({"gcs_server", "raylet"}), frozenset({"raylet"})
"""Names of the processes that make up Ray's head, and another node."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class EndedProcesses:
    """Number of processes that SIGTERM ended, and that only SIGKILL did."""

    terminated: int
    killed: int


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    """Process with ``TANDEM_CLUSTER_ID`` in its environment."""

    process: psutil.Process
    name: str
    cluster_id: str


def interrupt_on_termination() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too, so that all end what they started."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def find(home: Path) -> list[ClusterProcess]:
    """Return the processes of all clusters started with ``home``, except this one's ancestry."""
    found = []
    current = psutil.Process()
    excluded = {current.pid, *(parent.pid for parent in current.parents())}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in excluded:
            continue
        environment = environment_of(int(entry))
        if CLUSTER_ID in environment and environment.get(HOME) == str(home):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(entry))
                found.append(ClusterProcess(process, process.name(), environment[CLUSTER_ID]))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Return the initial environment of a cluster's process; empty for any other process."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    if CLUSTER_ID.encode() not in block:  # true of nearly all; saves parsing
        return {}
    pairs = (entry.partition("=") for entry in block.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def end_all(home: Path, *, grace_s: float, kill_s: float = 10.0) -> EndedProcesses:
    """End the processes of ``home``'s clusters: SIGTERM, and SIGKILL ``grace_s`` later.

    Raises:
        StartError: a process still exists ``kill_s`` after SIGKILL.
    """
    terminated: set[psutil.Process] = set()
    killed: set[psutil.Process] = set()
    kill_at = time.monotonic() + grace_s
    # A dying cluster still starts processes, so search again until none is left.
    while remaining := [owned.process for owned in find(home)]:
        now = time.monotonic()
        if now >= kill_at + kill_s:
            raise StartError(
                f"processes still run {kill_s:g} s after SIGKILL: {describe(remaining)}"
            )
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                if now >= kill_at:
                    process.kill()
                    killed.add(process)
                elif process not in terminated:
                    process.terminate()
                    terminated.add(process)
        time.sleep(POLL_S)
    return EndedProcesses(terminated=len(terminated - killed), killed=len(killed))


def rss_bytes(owned: list[ClusterProcess]) -> int:
    """Return the memory of all processes in bytes; shared pages count once per process."""
    total = 0
    for member in owned:
        with contextlib.suppress(psutil.Error):
            total += member.process.memory_info().rss
    return total


def describe(processes: list[psutil.Process]) -> str:
    return ", ".join(f"{process.pid} ({command(process)})" for process in processes)


def command(process: psutil.Process, limit: int = 70) -> str:
    try:
        line = " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        return "?"
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
