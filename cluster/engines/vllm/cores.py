"""Steps and statistics of vLLM's engine cores; there are several with data parallelism."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engines.stall import StallDetector
from cluster.load import Load


@dataclass(slots=True)
class _Core:
    stall: StallDetector
    num_steps: int = 0
    stats: Any = None


class EngineCores:
    """State of each core of one ``AsyncLLM``, reported by vLLM with every step.

    A step may also only prefill a part of a prompt.
    """

    def __init__(self, stall_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self.max_num_seqs = 0
        """Requests that can run at the same time in each core; 0 if unknown."""
        self._cores: dict[int, _Core] = {}

    def add(self, index: int) -> None:
        stall = StallDetector("engine", self._stall_timeout_s, self._clock)
        self._cores[index] = _Core(stall)

    def set_stall_timeout(self, timeout_s: float) -> None:
        """Change the time without a step after which a core hangs, in seconds."""
        for core in self._cores.values():
            core.stall.timeout_s = timeout_s

    def count_step(self, index: int, stats: Any) -> None:
        """Count a step; ``stats`` are vLLM's ``SchedulerStats``, or None."""
        core = self._cores[index]
        core.num_steps += 1
        if stats is not None:
            core.stats = stats

    def check(self, unfinished: Sequence[int]) -> None:
        """Raise if a core hangs.

        Args:
            unfinished: Unfinished requests of each core, in the order of their indexes.

        Raises:
            EngineDeadError: A core has had requests without a step for the timeout.
        """
        for core, number in zip(self._cores.values(), unfinished, strict=False):
            core.stall.check(core.num_steps, is_busy=bool(number))

    def load(self, unfinished: int) -> Load:
        """Return the load of all cores together.

        Args:
            unfinished: Unfinished requests of all cores. Always current, unlike the statistics,
                which are stale after an abort that leaves a core idle.
        """
        stats = [core.stats for core in self._cores.values() if core.stats is not None]
        slots = self.max_num_seqs * len(self._cores)
        if not stats or not unfinished:
            return Load(running=unfinished, slots=slots)
        # Aborted requests may be in the statistics: what runs does not wait.
        running = sum(core.num_running_reqs for core in stats)
        waiting = min(sum(core.num_waiting_reqs for core in stats), max(unfinished - running, 0))
        usage = sum(core.kv_cache_usage for core in stats) / len(self._cores)
        return Load(unfinished - waiting, waiting, usage, slots=slots)
