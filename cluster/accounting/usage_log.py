"""Keeps the hourly sums of one router, and with them those of all routers, in a SQLite file.

Owns the sums since the last write. Routers of one machine share the file: each adds to its rows.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

from cluster.accounting import ANONYMOUS, OTHER
from cluster.accounting.usage import HOUR_S, Row, UsageKey, UsageSums
from cluster.errors import InvalidRequestError

logger = logging.getLogger("ray.serve.tandem")

_Pending = dict[tuple[int, str, str, str], UsageSums]
"""By the fields of a ``UsageKey``."""

WRITE_S = 5.0
MAX_PENDING = 5000
"""Sums that wait for a file that cannot be written; the tenants of further ones are ``other``."""
MAX_ROWS = 10_000
"""Of one answer."""
_BUSY_TIMEOUT_S = 10.0

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
  hour INTEGER, tenant TEXT, model TEXT, source TEXT, requests INTEGER, prompt_tokens INTEGER,
  cached_tokens INTEGER, completion_tokens INTEGER, joules REAL, cost REAL,
  PRIMARY KEY (hour, tenant, model, source)) WITHOUT ROWID
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
  prompt_tokens = prompt_tokens + excluded.prompt_tokens,
  cached_tokens = cached_tokens + excluded.cached_tokens,
  completion_tokens = completion_tokens + excluded.completion_tokens,
  joules = joules + excluded.joules, cost = cost + excluded.cost
"""
_FIND = """
SELECT * FROM usage WHERE hour >= ? AND hour < ? AND (? IS NULL OR tenant = ?)
ORDER BY hour, tenant, model, source LIMIT ?
"""


class UsageLog:
    """See the module. ``start`` and ``close`` are due.

    Args:
        path: The file; it and its directory are made.
        keep_days: Older rows are deleted.
        clock: Unix time.
    """

    def __init__(self, path: Path, keep_days: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._keep_s = keep_days * 24 * HOUR_S
        self._clock = clock
        self._pending: _Pending = {}
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write every ``WRITE_S`` from now on."""
        self._task = asyncio.create_task(self._run(), name="usage-log")

    def add(self, tenant: str, model: str, source: str, sums: UsageSums) -> None:
        """Count a request that ended."""
        hour = int(self._clock()) // HOUR_S * HOUR_S
        known = self._pending.get((hour, tenant or ANONYMOUS, model, source))
        if known is None:
            kept = OTHER if len(self._pending) >= MAX_PENDING else tenant or ANONYMOUS
            known = self._pending.setdefault((hour, kept, model, source), UsageSums())
        known.add(sums)

    async def find(self, start: float, end: float, tenant: str | None) -> list[Row]:
        """The sums of the hours that begin in [start's hour, end), of one tenant or of all.

        Raises:
            InvalidRequestError: they are more than ``MAX_ROWS``.
            sqlite3.Error: the file cannot be read or written.
        """
        await self.write()
        first = int(start // HOUR_S * HOUR_S)
        rows = await asyncio.to_thread(self._find, first, end, tenant)
        if len(rows) > MAX_ROWS:
            raise InvalidRequestError(
                f"more than {MAX_ROWS} rows; ask for a shorter time or for one tenant", param="end"
            )
        return rows

    async def write(self) -> None:
        """Add what has come to the file; what cannot be written is kept and tried again."""
        async with self._writing:
            if not self._pending:
                return
            pending, self._pending = self._pending, {}
            try:
                await asyncio.shield(asyncio.to_thread(self._write, pending))
            except (sqlite3.Error, OSError):
                for key, sums in self._pending.items():
                    pending.setdefault(key, UsageSums()).add(sums)
                self._pending = pending
                raise

    async def close(self) -> None:
        """Write the rest and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        try:
            await self.write()
        except (sqlite3.Error, OSError):
            logger.exception("the last usage could not be written")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            try:
                await self.write()
            except (sqlite3.Error, OSError):  # the disk is full, or the file is locked for long
                logger.exception("usage could not be written; trying on")

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
        connection.execute(_TABLE)
        return connection

    def _write(self, sums: _Pending) -> None:
        rows: Iterable[tuple[object, ...]] = [
            (*key, *astuple(value)) for key, value in sums.items()
        ]
        with closing(self._open()) as connection, connection:
            connection.executemany(_ADD, rows)
            oldest = self._clock() - self._keep_s
            connection.execute("DELETE FROM usage WHERE hour < ?", (oldest,))

    def _find(self, first: int, end: float, tenant: str | None) -> list[Row]:
        with closing(self._open()) as connection:
            found = connection.execute(_FIND, (first, end, tenant, tenant, MAX_ROWS + 1))
            return [(UsageKey(*row[:4]), UsageSums(*row[4:])) for row in found]
