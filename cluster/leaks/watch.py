"""Periodic sampling of the memory of this process, its descendants and its workers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from cluster.config.operations import LeaksConfig
from cluster.leaks.detector import Growth, LeakDetector, MemorySample
from cluster.metrics import Registry, table
from cluster.periodic import Periodic

OWN = "own"
STARTED = "started"
"""All descendants of this process and workers in other actors together: the engine."""


class MemoryWatch:
    """Memory of this process, its descendants and its workers; call ``close`` at the end.

    Args:
        config: Settings.
        model: Label of the metrics.
        in_flight: Returns the requests in flight.
        on_leak: Called after each sample that shows a leak, with the process and its growth.
        workers: See ``resident_memory``.
        on_demand_bytes: See ``Engine.on_demand_bytes``; growth of ``STARTED`` that is no leak.
    """

    def __init__(
        self,
        config: LeaksConfig,
        model: str,
        in_flight: Callable[[], int],
        on_leak: Callable[[str, Growth], None] = lambda process, growth: None,
        workers: Sequence[int] = (),
        on_demand_bytes: int = 0,
    ) -> None:
        self._model = model
        self._in_flight = in_flight
        self._on_leak = on_leak
        self._config = config
        self._on_demand_bytes = on_demand_bytes
        self._detectors = self._make_detectors()
        self._workers = workers
        self._latest: dict[str, tuple[int, Growth]] = {}
        self._periodic = Periodic("memory watch", config.sample_s, self._sample)

    def reconfigure(self, config: LeaksConfig) -> None:
        """Apply changed settings; the examined window is cleared."""
        if config != self._config:
            self._config = config
            self._detectors = self._make_detectors()
            self._periodic.period_s = config.sample_s

    def observe(self, registry: Registry) -> None:
        for process, (resident, growth) in self._latest.items():
            memory = registry.gauge(table.RESIDENT_MEMORY, self._model, process)
            memory.value = float(resident)
            rate = registry.gauge(table.MEMORY_GROWTH, self._model, process)
            rate.value = growth.bytes_per_s

    async def close(self) -> None:
        await self._periodic.close()

    async def _sample(self) -> None:
        memory = await asyncio.to_thread(resident_memory, self._workers)
        now, in_flight = time.monotonic(), float(self._in_flight())
        for process, resident in memory.items():
            growth = self._detectors[process].add_sample(MemorySample(now, resident, in_flight))
            self._latest[process] = resident, growth
            if growth.leaking:
                self._on_leak(process, growth)

    def _make_detectors(self) -> dict[str, LeakDetector]:
        return {
            OWN: LeakDetector(self._config),
            STARTED: LeakDetector(self._config, self._on_demand_bytes),
        }


def resident_memory(workers: Sequence[int] = ()) -> dict[str, int]:
    """Return the memory of this process, and of its descendants and the workers, if any.

    Blocks for milliseconds. ``workers`` are pids of processes that others started.
    """
    own = psutil.Process()
    memory = {OWN: own.memory_info().rss}
    started = [child.pid for child in own.children(recursive=True)]
    if pids := {*started, *workers}:
        total = 0
        for pid in pids:
            with suppress(psutil.Error):  # it ended
                total += psutil.Process(pid).memory_info().rss
        memory[STARTED] = total
    return memory
