"""Periodic background task that survives failures."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("ray.serve.tandem")


class Periodic:
    """Runs ``action`` every ``period_s`` seconds until closed.

    Consecutive failures are logged once.
    """

    def __init__(self, name: str, period_s: float, action: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        self._period_s = period_s
        self._action = action
        self._failing = False
        self._task = asyncio.create_task(self._run(), name=name)

    async def close(self) -> None:
        """Stop; a running action is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self._action()
                self._failing = False
            except Exception:
                if not self._failing:
                    logger.exception("%s failed; retrying", self._name)
                self._failing = True
