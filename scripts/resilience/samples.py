"""Memory, descriptors, threads and tasks of a cluster's processes, and what a load leaves."""

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from benchmarks.processes import KB, MB, OTHER, parse_sizes, role_of
from resilience.growth import Sample
from resilience.inside.fault_points import COUNTS_DIR
from resilience.testbed import Testbed

METRICS = "metrics of routers"
"""Name of the samples with the number of series; each is of the router that answered."""
OURS = ("router", "engine", "classifier", "haproxy")
"""Roles of processes that must not grow. The others are Ray's own, and are only reported."""
LEFT_SHARE, LEFT_SPARE = 0.25, 16
"""Growth of a count from before a load until after it that is no leak: thread pools that have
started, and connections that are kept alive."""
LEFT_S = 90.0
"""Time after a load until nothing of it may be left; answers are kept for a minute."""
_TITLE = re.compile(r"[\w./:-]+")

Counts = Mapping[str, Mapping[str, int]]
"""Numbers of descriptors, threads and tasks by process."""


def read_samples(testbed: Testbed, at_s: float = 0.0) -> list[Sample]:
    """Return a sample of each process of the cluster."""
    samples = []
    for process in testbed.owned():
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            samples.append(read_sample(testbed.home, process, at_s))
    return samples


def read_sample(home: Path, process: psutil.Process, at_s: float) -> Sample:
    sizes = parse_sizes(Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii"))
    private_mb = (sizes["Private_Clean"] + sizes["Private_Dirty"]) * KB / MB
    counts = {"descriptors": process.num_fds(), "threads": process.num_threads()}
    with contextlib.suppress(OSError, ValueError):
        tasks = home / COUNTS_DIR / str(process.pid)
        counts["tasks"] = int(tasks.read_text(encoding="ascii"))
    return Sample(f"{name_of(process)} {process.pid}", at_s, private_mb, tuple(counts.items()))


def name_of(process: psutil.Process) -> str:
    """Return the role of a process of ours, and the name of any other."""
    command = " ".join(process.cmdline())
    if (role := role_of(command)) != OTHER:
        return role
    words = _TITLE.findall(command)
    return words[0].rpartition("/")[2] if words else process.name()


def is_ours(process: str) -> bool:
    return process.startswith((*OURS, METRICS))


def read_counts(testbed: Testbed) -> Counts:
    """Return the counts of our processes."""
    return {
        sample.process: dict(sample.counts)
        for sample in read_samples(testbed)
        if is_ours(sample.process)
    }


def find_left(before: Counts, after: Counts) -> list[str]:
    """Return a description of each count that grew too much, of processes in both."""
    return [
        f"{process}: {name} {old} → {new}"
        for process in before.keys() & after.keys()
        for name, old in before[process].items()
        if (new := after[process].get(name, 0)) > old * (1 + LEFT_SHARE) + LEFT_SPARE
    ]


def wait_nothing_left(testbed: Testbed, before: Counts) -> tuple[list[str], list[str]]:
    """Wait until the counts are as before a load; return what is left of it, and the survivors."""
    deadline = time.monotonic() + LEFT_S
    while True:
        after = read_counts(testbed)
        left = find_left(before, after)
        if not left or time.monotonic() > deadline:
            return left, sorted(before.keys() & after.keys())
        time.sleep(1.0)
