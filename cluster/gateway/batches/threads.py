"""Threads in which batches wait for the database and for files."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

NUM_SHORT, NUM_LONG = 8, 2

P = ParamSpec("P")
T = TypeVar("T")


class BatchThreads:
    """Two bounded pools, so that neither delays the router's other threads, nor the lease."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(NUM_SHORT, "tandem-batches")
        self._long = ThreadPoolExecutor(NUM_LONG, "tandem-batch-files")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a transaction, or read or write a piece of a file."""
        return await _run(self._short, function, *args, **kwargs)

    async def run_long(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read or write whole files."""
        return await _run(self._long, function, *args, **kwargs)

    def close(self) -> None:
        """End the threads once their calls have returned."""
        for executor in (self._short, self._long):
            executor.shutdown(wait=False)


async def _run(
    executor: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    call = partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(executor, call)
