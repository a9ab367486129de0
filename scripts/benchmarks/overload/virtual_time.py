"""Event loop with a simulated clock that jumps to the next timer when no task can run.

The real code runs on one event loop, in seconds instead of hours, independent of the machine.
"""

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop with a simulated clock."""

    def __init__(self) -> None:
        self._now = time.monotonic()
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Advance the clock without running any task."""
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if timeout and not ready:
            self._loop.advance(timeout)
        return ready


@contextmanager
def virtual_time() -> Iterator[asyncio.Runner]:
    """Yield a runner with a virtual clock, which replaces the process's monotonic clocks."""
    real = time.monotonic, time.perf_counter
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        time.monotonic = time.perf_counter = runner.get_loop().time
        try:
            yield runner
        finally:
            time.monotonic, time.perf_counter = real
