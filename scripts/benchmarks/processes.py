"""CPU time and memory of a target's processes, by role. Linux only (``/proc``)."""

import contextlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.endpoint import TargetError
from cluster.launch import processes

OTHER = "rest"
"""Role of Ray's own processes and everything else that belongs to a target."""

IDLE_CORES = 0.25
"""Upper bound on the CPU use of a cluster without requests, in cores."""
SETTLE_S = 10.0
SETTLE_POLL_S = 0.5
SAMPLE_S = 0.2
KB = 1024
MB = 1e6

_ROLES = {
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
"""Role of a process by a substring of its command line; the first match counts."""
_SIZE_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)

CpuSnapshot = Mapping[tuple[int, str], float]
"""CPU seconds so far, by process id and role."""


def role_of(command: str) -> str:
    """Return the role of the process with this command line."""
    return next((role for words, role in _ROLES.items() if words in command), OTHER)


def find_processes(home: Path, role: str) -> list[int]:
    """Return the ids of all processes of ``home`` in a role."""
    return [
        owned.process.pid
        for owned in processes.find(home)
        if role_of(" ".join(owned.process.cmdline())) == role
    ]


def find_process(home: Path, role: str) -> int:
    """Return the id of the only process of ``home`` in a role.

    Raises:
        TargetError: No process or several processes have the role.
    """
    pids = find_processes(home, role)
    if len(pids) != 1:
        raise TargetError(f"Expected one {role} process, found {len(pids)}.")
    return pids[0]


def take_cpu_snapshot(home: Path, name: Callable[[str], str] = role_of) -> CpuSnapshot:
    """Return the CPU time of every process of ``home``; ``name`` maps command lines to roles."""
    snapshot: dict[tuple[int, str], float] = {}
    for owned in processes.find(home):
        with contextlib.suppress(psutil.Error):
            times = owned.process.cpu_times()
            command = " ".join(owned.process.cmdline()) or owned.name
            snapshot[owned.process.pid, name(command)] = times.user + times.system
    return snapshot


def cpu_used(before: CpuSnapshot, after: CpuSnapshot) -> dict[str, float]:
    """Return the CPU seconds between two snapshots by role.

    Processes that ended in between are missing.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for process, total in after.items():
        seconds[process[1]] += total - before.get(process, 0.0)
    return dict(seconds)


def wait_idle(home: Path) -> None:
    """Wait until the processes of ``home`` are idle, at most ``SETTLE_S``.

    wrk aborts its last requests, and the servers still work on them for a moment.
    """
    deadline = time.monotonic() + SETTLE_S
    busy_s = SETTLE_POLL_S
    while busy_s > IDLE_CORES * SETTLE_POLL_S and time.monotonic() < deadline:
        before = take_cpu_snapshot(home)
        time.sleep(SETTLE_POLL_S)
        busy_s = sum(cpu_used(before, take_cpu_snapshot(home)).values())


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process in MB."""

    rss_mb: float
    """Resident set size; shared pages count in full."""
    pss_mb: float
    """Proportional set size; a shared page is divided by the number of its users."""

    @classmethod
    def read(cls, pid: int) -> "ProcessMemory":
        """Read the current memory of a process."""
        return cls.parse(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))

    @classmethod
    def parse(cls, smaps_rollup: str) -> "ProcessMemory":
        """Parse the text of ``/proc/PID/smaps_rollup``."""
        sizes = parse_sizes(smaps_rollup)
        return cls(sizes["Rss"] * KB / MB, sizes["Pss"] * KB / MB)


def parse_sizes(text: str) -> dict[str, int]:
    """Parse lines of the form ``Name:   NUMBER kB``; other lines are ignored."""
    return {name: int(number) for name, number in _SIZE_LINE.findall(text)}


def pss_mb(home: Path, name: Callable[[str], str] = role_of) -> dict[str, float]:
    """Return the memory of the processes of ``home`` (PSS) in MB; ``name`` maps command lines."""
    memory: defaultdict[str, float] = defaultdict(float)
    for owned in processes.find(home):
        with contextlib.suppress(psutil.Error, OSError):  # it has ended
            command = " ".join(owned.process.cmdline())
            memory[name(command)] += ProcessMemory.read(owned.process.pid).pss_mb
    return dict(memory)


class PeakMemory:
    """Context manager that records the memory peak of a process.

    The kernel records the peak RSS; the peak PSS comes from samples.
    """

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self._pid = pid
        self._samples: list[ProcessMemory] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak(self) -> ProcessMemory:
        """Peak of RSS and of PSS; valid after exit."""
        status = parse_sizes((self._proc / "status").read_text(encoding="utf-8"))
        return ProcessMemory(
            status["VmHWM"] * KB / MB, max(sample.pss_mb for sample in self._samples)
        )

    def __enter__(self) -> Self:
        (self._proc / "clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self._samples.append(ProcessMemory.read(self._pid))
            if self._stopped.wait(SAMPLE_S):
                return
