"""SQLite file with the hourly sums of usage, shared by the routers of a machine.

It also has copies of the sums of other machines, whose files may be lost.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cluster.accounting import ANONYMOUS, OTHER
from cluster.accounting.usage import HOUR_S, UsageKey, UsageRow, UsageSums
from cluster.admission.budgets import DAY_S, SpendRow
from cluster.errors import InvalidRequestError
from cluster.periodic import Periodic

logger = logging.getLogger("ray.serve.tandem")

WRITE_S = 5.0
MAX_PENDING = 5000
"""Sums kept while the file cannot be written; further tenants are counted as ``other``."""
MIN_SPEND_DAYS = 32
MAX_ROWS = 10_000
"""Rows per response."""
_BUSY_TIMEOUT_S = 10.0

_TABLE = """
CREATE TABLE IF NOT EXISTS usage (
  hour INTEGER, tenant TEXT, model TEXT, source TEXT, requests INTEGER, prompt_tokens INTEGER,
  cached_tokens INTEGER, completion_tokens INTEGER, joules REAL, cost REAL,
  PRIMARY KEY (hour, tenant, model, source)) WITHOUT ROWID
"""
_COPIES = """
CREATE TABLE IF NOT EXISTS copy (
  file TEXT, hour INTEGER, tenant TEXT, model TEXT, source TEXT, requests INTEGER,
  prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER, joules REAL, cost REAL,
  PRIMARY KEY (file, hour, tenant, model, source)) WITHOUT ROWID
"""
_SPEND_TABLE = """
CREATE TABLE IF NOT EXISTS spend (
  day INTEGER, tenant TEXT, key TEXT, cost REAL, PRIMARY KEY (day, tenant, key)) WITHOUT ROWID
"""
_ADD_SPEND = """
INSERT INTO spend VALUES (?, ?, ?, ?)
ON CONFLICT DO UPDATE SET cost = cost + excluded.cost
"""
_FILE_ID = """
CREATE TABLE IF NOT EXISTS file (id TEXT PRIMARY KEY);
INSERT INTO file SELECT lower(hex(randomblob(16))) WHERE NOT EXISTS (SELECT 1 FROM file);
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
_FIND_COPIES = """
SELECT * FROM copy WHERE hour >= ? AND hour < ? AND (? IS NULL OR tenant = ?)
ORDER BY file, hour, tenant, model, source LIMIT ?
"""


class UsageLog:
    """Hourly sums of one router, added to the shared file; call ``start`` and ``close``.

    The file is created with its directory.
    """

    def __init__(self, path: Path, keep_days: int, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self.keep_days = keep_days
        """Age of the oldest sums; may be changed."""
        self._clock = clock
        self._pending: dict[UsageKey, UsageSums] = {}
        self._pending_spend: dict[tuple[int, str, str], float] = {}
        self._writing = asyncio.Lock()
        self._periodic: Periodic | None = None

    def start(self) -> None:
        self._periodic = Periodic("writing of usage", WRITE_S, self.write)

    def add_request(self, tenant: str, model: str, source: str, sums: UsageSums) -> None:
        hour = int(self._clock()) // HOUR_S * HOUR_S
        key = UsageKey(hour, tenant or ANONYMOUS, model, source)
        if key not in self._pending and len(self._pending) >= MAX_PENDING:
            key = key._replace(tenant=OTHER)
        self._pending.setdefault(key, UsageSums()).add(sums)

    def add_spend(self, row: SpendRow) -> None:
        """Add the cost of a request to that of its key."""
        key = row.day, row.tenant, row.key
        if key not in self._pending_spend and len(self._pending_spend) >= MAX_PENDING:
            key = row.day, OTHER, ""
        self._pending_spend[key] = self._pending_spend.get(key, 0.0) + row.cost

    async def find_spend(self, first_day: int) -> list[SpendRow]:
        """Return the costs by day and key since a day (days since 1970 in UTC).

        Raises:
            sqlite3.Error: The file cannot be read or written.
        """
        await self.write()
        return await asyncio.to_thread(self._find_spend, first_day)

    async def find(self, start: float, end: float, tenant: str | None) -> list[UsageRow]:
        """Return the sums of the hours from that of ``start`` up to ``end``, of one tenant or all.

        Raises:
            InvalidRequestError: There are more than ``MAX_ROWS`` rows.
            sqlite3.Error: The file cannot be read or written.
        """
        await self.write()
        found = await asyncio.to_thread(self._find, _FIND, start, end, tenant)
        return [(UsageKey(*row[:4]), UsageSums(*row[4:])) for row in found]

    async def find_copies(
        self, start: float, end: float, tenant: str | None
    ) -> list[tuple[str, UsageRow]]:
        """Return file id and row of the copies; see ``find``."""
        found = await asyncio.to_thread(self._find, _FIND_COPIES, start, end, tenant)
        return [(row[0], (UsageKey(*row[1:5]), UsageSums(*row[5:]))) for row in found]

    async def store_copy(self, file_id: str, rows: Iterable[UsageRow]) -> None:
        """Store the sums of another machine's file instead of those stored before.

        Raises:
            sqlite3.Error: The file cannot be written.
        """
        values = [(file_id, *key, *astuple(sums)) for key, sums in rows]
        await asyncio.to_thread(self._store_copy, values)

    async def file_id(self) -> str:
        """Return the id of the file, by which routers of one node are recognized.

        Raises:
            sqlite3.Error: The file cannot be read or written.
        """
        return await asyncio.to_thread(self._file_id)

    async def write(self) -> None:
        """Write the pending sums; keep them for the next write if that fails."""
        async with self._writing:
            if not self._pending and not self._pending_spend:
                return
            pending, self._pending = self._pending, {}
            spend, self._pending_spend = self._pending_spend, {}
            try:
                await asyncio.shield(asyncio.to_thread(self._write, pending, spend))
            except (sqlite3.Error, OSError):
                for spend_key, cost in spend.items():
                    self.add_spend(SpendRow(*spend_key, cost))
                for key, sums in self._pending.items():
                    pending.setdefault(key, UsageSums()).add(sums)
                self._pending = pending
                raise

    async def close(self) -> None:
        if self._periodic is not None:
            await self._periodic.close()
        try:
            await self.write()
        except (sqlite3.Error, OSError):
            logger.exception("cannot write the last usage, which is lost")

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
        connection.execute(_TABLE)
        connection.execute(_COPIES)
        connection.execute(_SPEND_TABLE)
        return connection

    def _file_id(self) -> str:
        with closing(self._open()) as connection:
            connection.executescript(f"BEGIN IMMEDIATE;{_FILE_ID}COMMIT;")
            found: tuple[str] = connection.execute("SELECT id FROM file").fetchone()
            return found[0]

    def _write(
        self, pending: Mapping[UsageKey, UsageSums], spend: Mapping[tuple[int, str, str], float]
    ) -> None:
        rows = [(*key, *astuple(sums)) for key, sums in pending.items()]
        with closing(self._open()) as connection, connection:
            connection.executemany(_ADD, rows)
            connection.executemany(_ADD_SPEND, [(*key, cost) for key, cost in spend.items()])
            oldest = self._clock() - self.keep_days * 24 * HOUR_S
            connection.execute("DELETE FROM usage WHERE hour < ?", (oldest,))
            connection.execute("DELETE FROM copy WHERE hour < ?", (oldest,))
            # A month's budget needs its days, however short the usage is kept.
            first = min(oldest // DAY_S, self._clock() // DAY_S - MIN_SPEND_DAYS)
            connection.execute("DELETE FROM spend WHERE day < ?", (first,))

    def _find_spend(self, first_day: int) -> list[SpendRow]:
        with closing(self._open()) as connection:
            found = connection.execute("SELECT * FROM spend WHERE day >= ?", (first_day,))
            return [SpendRow(*row) for row in found]

    def _store_copy(self, values: list[tuple[object, ...]]) -> None:
        with closing(self._open()) as connection, connection:
            marks = ", ".join("?" * 11)
            connection.executemany(f"INSERT OR REPLACE INTO copy VALUES ({marks})", values)

    def _find(
        self, query: str, start: float, end: float, tenant: str | None
    ) -> list[tuple[Any, ...]]:
        first = int(start // HOUR_S * HOUR_S)
        with closing(self._open()) as connection:
            cursor = connection.execute(query, (first, end, tenant, tenant, MAX_ROWS + 1))
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        if len(rows) > MAX_ROWS:
            raise InvalidRequestError(
                f"more than {MAX_ROWS} rows; request a shorter time or one tenant", param="end"
            )
        return rows
