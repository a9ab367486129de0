"""The energy counters and CPU clocks of this machine, as running sums."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

POWERCAP = Path("/sys/class/powercap")
CHILDREN_EVERY = 15
"""Readings between two searches for new child processes; a search looks at every process."""


class Rapl:
    """The energy of all CPU packages since the start (Intel's and AMD's RAPL, through powercap).

    Raises:
        PermissionError: the counters are there, but may not be read.
        FileNotFoundError: there are none.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = root or POWERCAP
        # A zone's parts (core, uncore, dram of package 0) are named intel-rapl:0:1; the packages
        # alone count each joule once.
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        if not self._zones:
            raise FileNotFoundError(f"{root} has no RAPL zone")
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = self._read()
        self._sum = 0

    def joules(self) -> float:
        """Since this was made."""
        now = self._read()
        for before, after, whole in zip(self._last, now, self._ranges, strict=True):
            # The counters wrap; at 60 J/s, not more often than every hour or so.
            self._sum += after - before + (whole if after < before else 0)
        self._last = now
        return self._sum / 1e6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") for zone in self._zones]


def _microjoules(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


class ProcessTree:
    """The CPU time and the memory of this process and of all that it started."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._children: list[psutil.Process] = []
        self._readings = 0
        self._last: dict[int, float] = {}
        self._sum = 0.0

    def cpu_s(self) -> float:
        """User and system time since the first reading; blocks for some milliseconds."""
        if self._readings % CHILDREN_EVERY == 0:
            self._children = self._own.children(recursive=True)
        self._readings += 1
        now: dict[int, float] = {}
        for process in (self._own, *self._children):
            with suppress(psutil.Error):  # it ended
                times = process.cpu_times()
                now[process.pid] = times.user + times.system
        # One that was not there before has brought its time since its start, but at the first.
        new = 0.0 if self._last else None
        for pid, spent in now.items():
            before = self._last.get(pid, new)
            self._sum += 0.0 if before is None else max(0.0, spent - before)
        self._last = now
        return self._sum


def machine_busy_s() -> float:
    """CPU time that all cores of the machine have been busy since its start."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # A guest's time stands within user's, too.
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - twice)


class Grown:
    """By how much a running sum has grown since the last look; never less than 0."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._last = read()

    def __call__(self) -> float:
        """The growth since the last call."""
        now = self._read()
        grown, self._last = now - self._last, now
        return max(0.0, grown)
