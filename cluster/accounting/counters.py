"""Energy counters and CPU clocks of this machine, as running sums."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

POWERCAP = Path("/sys/class/powercap")
READINGS_PER_SEARCH = 15
"""Readings between searches for new child processes; a search visits all processes."""


class Rapl:
    """Energy of all CPU packages since construction (Intel and AMD RAPL, through powercap).

    Raises:
        PermissionError: The counters exist but are not readable.
        FileNotFoundError: There are no counters.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = root or POWERCAP
        # Subzones (core, uncore, dram of package 0) are named intel-rapl:0:1; counting packages
        # only counts each joule once.
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        if not self._zones:
            raise FileNotFoundError(f"{root} has no RAPL zone")
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = self._read()
        self._sum = 0

    def joules(self) -> float:
        """Return the energy since construction; call at least once an hour."""
        now = self._read()
        for before, after, counter_range in zip(self._last, now, self._ranges, strict=True):
            # The counters wrap around; at 60 W, about once an hour.
            self._sum += after - before + (counter_range if after < before else 0)
        self._last = now
        return self._sum / 1e6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") for zone in self._zones]


def _microjoules(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


class ProcessTree:
    """CPU time of this process, its descendants, and workers that others started."""

    def __init__(self, workers: Sequence[int] = ()) -> None:
        self._own = psutil.Process()
        self._workers: list[psutil.Process] = []
        for pid in workers:
            with suppress(psutil.Error):  # it ended
                self._workers.append(psutil.Process(pid))
        self._children: list[psutil.Process] = []
        self._readings = 0
        self._last: dict[int, float] = {}
        self._sum = 0.0

    def cpu_s(self) -> float:
        """Return user and system time since the first call; blocks for some milliseconds."""
        if self._readings % READINGS_PER_SEARCH == 0:
            self._children = self._own.children(recursive=True)
        self._readings += 1
        now: dict[int, float] = {}
        for process in (self._own, *self._workers, *self._children):
            with suppress(psutil.Error):  # it ended
                times = process.cpu_times()
                now[process.pid] = times.user + times.system
        # A new process counts from its start, except in the first reading.
        new = 0.0 if self._last else None
        for pid, spent in now.items():
            before = self._last.get(pid, new)
            self._sum += 0.0 if before is None else max(0.0, spent - before)
        self._last = now
        return self._sum


def machine_busy_s() -> float:
    """Return the busy CPU time of all cores since the machine started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux includes guest time in user time.
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guest)


class Increase:
    """Increase of a running sum between calls, at least 0."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._last = read()

    def __call__(self) -> float:
        now = self._read()
        increase, self._last = now - self._last, now
        return max(0.0, increase)
