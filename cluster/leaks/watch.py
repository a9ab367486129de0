"""Samples the memory of one process and of what it started, and tells how it grows."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from cluster.config.operations import LeaksConfig
from cluster.leaks.detector import Growth, LeakDetector
from cluster.metrics import Registry, table
from cluster.periodic import Periodic

OWN = "own"
STARTED = "started"
"""All processes that the own one started, together: an engine and its workers."""


class MemoryWatch:
    """The memory of this process and its children; ``close`` is due.

    Args:
        config: How often, and what is a leak.
        model: The pool's name, or the router's.
        ongoing: How many requests are being served.
        on_leak: Called after each sample while a leak is seen, with what leaks.
    """

    def __init__(
        self,
        config: LeaksConfig,
        model: str,
        ongoing: Callable[[], int],
        on_leak: Callable[[str, Growth], None] = lambda process, growth: None,
    ) -> None:
        self._model = model
        self._ongoing = ongoing
        self._on_leak = on_leak
        self._detectors = {OWN: LeakDetector(config), STARTED: LeakDetector(config)}
        self._seen: dict[str, tuple[int, Growth]] = {}
        self._periodic = Periodic("memory watch", config.sample_s, self._sample)

    def observe(self, registry: Registry) -> None:
        """Write the last sample into the registry."""
        for process, (resident, growth) in self._seen.items():
            memory = registry.gauge(table.RESIDENT_MEMORY, self._model, process)
            memory.value = float(resident)
            rate = registry.gauge(table.MEMORY_GROWTH, self._model, process)
            rate.value = growth.bytes_per_s

    async def close(self) -> None:
        """End the sampling."""
        await self._periodic.close()

    async def _sample(self) -> None:
        memory = await asyncio.to_thread(resident_memory)
        now, ongoing = time.monotonic(), float(self._ongoing())
        for process, resident in memory.items():
            growth = self._detectors[process].sample(now, resident, ongoing)
            self._seen[process] = resident, growth
            if growth.leaking:
                self._on_leak(process, growth)


def resident_memory() -> dict[str, int]:
    """Bytes of this process, and of all that it started if there are any; blocks for some ms."""
    own = psutil.Process()
    memory = {OWN: own.memory_info().rss}
    if children := own.children(recursive=True):
        started = 0
        for child in children:
            with suppress(psutil.Error):  # it ended
                started += child.memory_info().rss
        memory[STARTED] = started
    return memory
