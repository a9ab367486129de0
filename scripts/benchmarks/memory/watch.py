"""The memory of one process, now and at its peak; Linux's ``/proc`` alone."""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.cpu import part_of
from benchmarks.endpoint import TargetError
from cluster.launch import processes

SAMPLE_S = 0.2
KB = 1024
MB = 1e6

_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process holds."""

    rss_mb: float
    """Every page that it has mapped and that is in memory, the shared ones too."""
    pss_mb: float
    """Of a page that several processes share, only its part."""

    @classmethod
    def of(cls, pid: int) -> "Memory":
        """Now."""
        return cls.parse(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))

    @classmethod
    def parse(cls, smaps_rollup: str) -> "Memory":
        """From the text of ``/proc/PID/smaps_rollup``."""
        found = fields(smaps_rollup)
        return cls(found["Rss"] * KB / MB, found["Pss"] * KB / MB)


def fields(text: str) -> dict[str, int]:
    """The lines ``Name:   NUMBER kB`` of one of Linux's files on a process."""
    return {name: int(number) for name, number in _LINE.findall(text)}


def process_of(home: Path, part: str) -> int:
    """The id of the one process of ``home`` that plays ``part``.

    Raises:
        TargetError: there is none, or more than one.
    """
    found = processes_of(home, part)
    if len(found) != 1:
        raise TargetError(f"{len(found)} processes play the {part}")
    return found[0]


def processes_of(home: Path, part: str) -> list[int]:
    """The ids of all processes of ``home`` that play ``part``."""
    return [
        owned.process.pid
        for owned in processes.find(home)
        if part_of(" ".join(owned.process.cmdline())) == part
    ]


class Watch:
    """The peak between entry and exit: RSS as the kernel kept it, PSS of samples."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self._pid = pid
        self._samples: list[Memory] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak(self) -> Memory:
        """The highest of each; after exit."""
        status = fields((self._proc / "status").read_text(encoding="utf-8"))
        return Memory(status["VmHWM"] * KB / MB, max(one.pss_mb for one in self._samples))

    def __enter__(self) -> Self:
        (self._proc / "clear_refs").write_text("5", encoding="ascii")  # the peak is the present now
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self._samples.append(Memory.of(self._pid))
            if self._done.wait(SAMPLE_S):
                return
