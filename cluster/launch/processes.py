"""The processes of a cluster: found by their environment, and ended.

Ray's workers, HAProxy and the engines' processes all inherit ``TANDEM_CLUSTER_ID``, whoever their
parent is by now, so they are found after any crash. Owns no state.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import StartError

CLUSTER_ID = "TANDEM_CLUSTER_ID"
HOME = "TANDEM_HOME"
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """How the processes of a cluster ended."""

    terminated: int
    """On SIGTERM."""
    killed: int
    """By SIGKILL, because SIGTERM did not end them in time."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A process that carries a cluster's mark."""

    process: psutil.Process
    name: str
    cluster_id: str


def find(home: Path) -> list[Owned]:
    """The processes of every cluster that was started with ``home``, this one and its parents
    left out."""
    return list(_scan(str(home)))


def _scan(home: str) -> Iterator[Owned]:
    mine = _own_line()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in mine:
            continue
        environment = environment_of(int(entry))
        if CLUSTER_ID in environment and environment.get(HOME) == home:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(entry))
                yield Owned(process, process.name(), environment[CLUSTER_ID])


def has_head(found: list[Owned]) -> bool:
    """Whether Ray's GCS is among them: without it a cluster is dead, whatever else runs."""
    return any(owned.name == "gcs_server" for owned in found)


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty where it may not be read."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    if CLUSTER_ID.encode() not in block:  # nearly all of them; the rest is worth parsing
        return {}
    pairs = (entry.partition("=") for entry in block.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def _own_line() -> set[int]:
    me = psutil.Process()
    return {me.pid, *(parent.pid for parent in me.parents())}


def end(home: Path, *, grace_s: float, kill_s: float = 10.0) -> Ended:
    """End all processes of ``home``'s clusters: SIGTERM, ``grace_s`` later SIGKILL.

    Looks again until none is left, since a dying cluster still starts processes.

    Raises:
        StartError: one is still there ``kill_s`` after SIGKILL.
    """
    asked: set[psutil.Process] = set()
    killed: set[psutil.Process] = set()
    kill_at = time.monotonic() + grace_s
    while found := [owned.process for owned in find(home)]:
        now = time.monotonic()
        if now >= kill_at + kill_s:
            raise StartError(f"these processes cannot be ended: {describe(found)}")
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                if now >= kill_at:
                    process.kill()
                    killed.add(process)
                elif process not in asked:
                    process.terminate()
                    asked.add(process)
        time.sleep(POLL_S)
    return Ended(terminated=len(asked - killed), killed=len(killed))


def rss_bytes(found: list[Owned]) -> int:
    """Memory of all processes; what they share counts in each."""
    total = 0
    for owned in found:
        with contextlib.suppress(psutil.Error):
            total += owned.process.memory_info().rss
    return total


def describe(processes: list[psutil.Process]) -> str:
    """Process ids and command lines, for a message."""
    return ", ".join(f"{process.pid} ({command(process)})" for process in processes)


def command(process: psutil.Process, limit: int = 70) -> str:
    """A process' command line, shortened."""
    try:
        line = " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        return "?"
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
