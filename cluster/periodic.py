"""Background work: periodic tasks that survive failures, and calls in daemon threads."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger("ray.serve.tandem")


class Periodic:
    """Runs ``action`` every ``period_s`` seconds until closed.

    Consecutive failures are logged once. ``period_s`` may be changed; the next period has it.
    """

    def __init__(self, name: str, period_s: float, action: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        self.period_s = period_s
        self._action = action
        self._failing = False
        self._task = asyncio.create_task(self._run(), name=name)

    async def close(self) -> None:
        """Stop; a running action is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.period_s)
            try:
                await self._action()
                self._failing = False
            except Exception:
                if not self._failing:
                    logger.exception("%s failed; retrying", self._name)
                self._failing = True


def run_in_daemon_thread(function: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run a function that may hang in a new daemon thread; return the future of its result.

    Unlike threads of an executor, this one does not keep the process from exiting.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: Exception | None) -> None:
        if future.done():  # cancelled
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
