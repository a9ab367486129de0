"""CPU time of a target's processes, by the part that each plays."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster.launch import processes

REST = "rest"
"""Ray's own processes, and whatever else belongs to a target."""

QUIET = 0.25
"""Cores that a cluster without requests uses at most."""
SETTLE_S = 10.0
SETTLE_POLL_S = 0.5

_PARTS = {
    "haproxy": "haproxy",
    "ray::ProxyActor": "proxy",
    "vllm-router": "router",
    "benchmarks.targets.bare": "engine",
    ":router": "router",
    ":ingress": "ingress",
    ":generator-": "engine",
    ":classifier-": "classifier",
    ":engine": "engine",
}
"""Words of a command line, and what the process is then."""

Snapshot = Mapping[tuple[int, str], float]
"""CPU seconds so far, by process id and part."""


def part_of(command: str) -> str:
    """Which part the process with this command line plays."""
    return next((part for words, part in _PARTS.items() if words in command), REST)


def snapshot(home: Path) -> Snapshot:
    """The CPU time of every process of ``home``."""
    found: dict[tuple[int, str], float] = {}
    for owned in processes.find(home):
        with contextlib.suppress(psutil.Error):
            times = owned.process.cpu_times()
            command = " ".join(owned.process.cmdline()) or owned.name
            found[owned.process.pid, part_of(command)] = times.user + times.system
    return found


def settle(home: Path) -> None:
    """Return once a load's leftovers are done: wrk breaks off its last requests."""
    deadline = time.monotonic() + SETTLE_S
    busy_s = SETTLE_POLL_S
    while busy_s > QUIET * SETTLE_POLL_S and time.monotonic() < deadline:
        before = snapshot(home)
        time.sleep(SETTLE_POLL_S)
        busy_s = sum(spent(before, snapshot(home)).values())


def spent(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """CPU seconds between two snapshots, by part; what ended between them is not seen."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process, total in after.items():
        seconds[process[1]] += total - before.get(process, 0.0)
    return dict(seconds)
