"""Startup helpers: age of the process, timing of phases, priority, cheaper imports."""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cluster.periodic import run_in_daemon_thread

T = TypeVar("T")

STARTED_AT = "TANDEM_STARTED_AT"
"""Environment variable with the Unix time at which the start of a local cluster began."""
CLUSTER_START_S = 60.0
"""Age of a cluster until which its processes give way to those that start longer, in seconds."""
START_NICENESS = 10


def process_age_s() -> float:
    """Return the age of this process in seconds, with a resolution of 0.01 s."""
    # psutil derives the age from the boot time in whole seconds, which is too coarse.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start_ticks = int(fields[19])  # field starttime in proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


class StartupTimer:
    """Durations of startup phases, which follow each other without a gap."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marked_at = clock()
        self.phases_s: dict[str, float] = {}
        """Duration of each phase in seconds, in order."""

    def mark(self, phase: str) -> None:
        self.add_measured({phase: self._clock() - self._marked_at})

    def add_measured(self, phases_s: Mapping[str, float]) -> None:
        """Attribute part of the time since the last mark to phases that were measured elsewhere."""
        for phase, duration_s in phases_s.items():
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + duration_s
            self._marked_at += duration_s

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection, and freeze the objects that exist at the end.

    Use it for importing code only: a model that is part of a reference cycle would never be freed.
    """
    # Imports create a million objects that live as long as the process; scanning them repeatedly
    # takes a fifth of the import time. A final collection before the freeze would free 1 % of them
    # and cost a third of what this saves (ADR 10).
    # A second engine in the process imports nothing new, and freezing again would also keep the
    # garbage of the first engine.
    is_first = not gc.get_freeze_count()
    gc.disable()
    try:
        yield
        if is_first:
            gc.freeze()
    finally:
        gc.enable()


@contextmanager
def modules_hidden(*names: str) -> Iterator[None]:
    """Make modules that are not imported yet appear as not installed, also to other threads."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def is_cluster_starting(environment: Mapping[str, str], now: float) -> bool:
    """Return True in the first minute of a local cluster; ``now`` is Unix time."""
    try:
        return 0.0 <= now - float(environment[STARTED_AT]) < CLUSTER_START_S
    except (KeyError, ValueError):
        return False


async def call_at_low_priority(function: Callable[[], T]) -> T:
    """Call a function in another thread, which gives way to other processes.

    A process without privileges cannot raise its own priority again.
    """

    def call() -> T:
        if os.uname().sysname == "Linux":  # elsewhere it would affect the process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), START_NICENESS)
        return function()

    return await run_in_daemon_thread(call, "tandem-start")
