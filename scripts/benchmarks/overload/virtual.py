"""A clock that jumps to the next timer when nothing is left to do: hours without any waiting.

What runs under it is the code itself on one event loop; only the machine's speed has no part in it.
"""

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with such a clock."""

    def __init__(self) -> None:
        self._now = time.monotonic()
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Seconds on its clock."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass in which nothing runs."""
        self._now += seconds


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if timeout and not ready:
            self._loop.jump(timeout)
        return ready


@contextmanager
def virtual_time() -> Iterator[asyncio.Runner]:
    """Runs coroutines by this clock, which is the whole process' monotonic one meanwhile."""
    real = time.monotonic, time.perf_counter
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        time.monotonic = time.perf_counter = runner.get_loop().time
        try:
            yield runner
        finally:
            time.monotonic, time.perf_counter = real
