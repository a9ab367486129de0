"""Databases of knowledge bases in LanceDB: one per tenant, with a table per knowledge base.

LanceDB is embedded: its asynchronous interface works in its own threads, on files or objects that
several processes may share. Each change is one transaction; readers see the latest version.
"""

import asyncio
import hashlib
import importlib
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from cachetools import LRUCache

from cluster.applications.knowledge.table import (
    BaseSettings,
    Table,
    read_settings,
    table_schema,
)
from cluster.config.applications import KnowledgeConfig
from cluster.errors import InvalidRequestError, NotFoundError, UnavailableError, UnprocessableError

logger = logging.getLogger("ray.serve.tandem")

MAX_OPERATIONS = 16
"""Operations of the store at the same time in one replica; others wait."""
MAX_DATABASES = 256
"""Tenants whose databases stay open."""
INDEX_CACHE_BYTES = 256 * 1024**2
METADATA_CACHE_BYTES = 64 * 1024**2
MAINTAINED_ROWS = 1000
"""Changed rows after which the indexes are updated. Until then, searches read them all."""
CHANGE_ROWS = 40
"""Rows for which one change counts in addition: each adds a version and files."""
MAX_NOTED = 10_000
"""Tables whose changes are counted."""


class Store:
    """Databases of all tenants.

    Args:
        location: Directory, or URI of an object store.
        config: Limits.
    """

    def __init__(self, location: str, config: KnowledgeConfig) -> None:
        self.config = config
        self._location = location.rstrip("/")
        self._limit = asyncio.Semaphore(MAX_OPERATIONS)
        self._session: Any = None
        self._databases: LRUCache[str, Any] = LRUCache(MAX_DATABASES)
        self._changes: LRUCache[str, int] = LRUCache(MAX_NOTED)
        self._maintenance: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def operation(self) -> AsyncIterator[None]:
        """Bound the number and the duration of operations, and translate errors.

        Raises:
            UnavailableError: The store fails, or takes too long.
        """
        try:
            async with self._limit, asyncio.timeout(self.config.store_timeout_s):
                yield
        except TimeoutError:
            limit = f"{self.config.store_timeout_s:g} s (applications.knowledge.store_timeout_s)"
            raise UnavailableError(f"The store took longer than {limit}.") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise UnavailableError(f"The store of knowledge bases failed: {error}") from error

    async def names(self, tenant: str) -> list[str]:
        """Return the names of a tenant's knowledge bases, in order."""
        async with self.operation():
            found = await (await self._connect(tenant)).list_tables()
            return sorted(found.tables)

    async def create(self, tenant: str, name: str, settings: BaseSettings) -> Table:
        """Create a knowledge base, or return the existing one with the same settings.

        Raises:
            UnprocessableError: One exists with other settings.
            InvalidRequestError: The tenant has too many.
        """
        names = await self.names(tenant)
        if name not in names:
            if len(names) >= self.config.max_bases:
                raise InvalidRequestError(
                    f"There are {len(names)} knowledge bases; the limit is "
                    f"{self.config.max_bases} (applications.knowledge.max_bases). Delete one."
                )
            await self._create(tenant, name, settings)
        table = await self.open(tenant, name)
        if table.settings != settings:
            raise UnprocessableError(
                f"The knowledge base `{name}` exists with other settings: "
                f"{json.dumps(asdict(table.settings))}.",
                param="name",
            )
        await table.ensure_indexes()
        return table

    async def open(self, tenant: str, name: str) -> Table:
        """Return a knowledge base.

        Raises:
            NotFoundError: The tenant has none with this name.
        """
        async with self.operation():
            database = await self._connect(tenant)
            try:
                inner = await database.open_table(name)
            except ValueError as error:
                if "was not found" not in str(error):
                    raise
                raise _missing(name) from None
            schema = await inner.schema()
        return Table(self, f"{_directory(tenant)}/{name}", inner, read_settings(schema))

    async def drop(self, tenant: str, name: str) -> None:
        """Delete a knowledge base; raises as ``open`` does."""
        async with self.operation():
            database = await self._connect(tenant)
            try:
                await database.drop_table(name)
            except ValueError as error:
                if "was not found" not in str(error):
                    raise
                raise _missing(name) from None

    def note_change(self, table: Table, num_rows: int) -> None:
        """Update the indexes of a table in the background once enough rows have changed."""
        key = table.key
        self._changes[key] = self._changes.get(key, 0) + num_rows + CHANGE_ROWS
        if self._changes[key] < MAINTAINED_ROWS or key in self._maintenance:
            return
        del self._changes[key]
        task = asyncio.create_task(self._maintain(table))
        self._maintenance[key] = task
        task.add_done_callback(lambda _: self._maintenance.pop(key, None))

    async def close(self) -> None:
        """Stop the maintenance of tables; what is not done will be later."""
        tasks = list(self._maintenance.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _maintain(self, table: Table) -> None:
        try:
            await table.maintain(self.config.index_passages)
        except Exception:  # another process may have changed or deleted the table
            logger.warning("the indexes of %s were not updated", table.key, exc_info=True)

    async def _create(self, tenant: str, name: str, settings: BaseSettings) -> None:
        async with self.operation():
            database = await self._connect(tenant)
            try:
                await database.create_table(name, schema=table_schema(settings))
            except ValueError as error:
                if "already exists" not in str(error):  # created by another request
                    raise

    async def _connect(self, tenant: str) -> Any:
        directory = _directory(tenant)
        if (database := self._databases.get(directory)) is None:
            lancedb = await asyncio.to_thread(_import_lancedb)  # takes seconds
            if self._session is None:
                self._session = lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)
            database = await lancedb.connect_async(
                f"{self._location}/{directory}",
                read_consistency_interval=timedelta(0),
                session=self._session,
            )
            self._databases[directory] = database
        return database


def _import_lancedb() -> Any:
    # Each hybrid search would log that LanceDB's columns of scores will change.
    os.environ.setdefault("LANCEDB_LOG", "warn,lance::dataset::scanner=error")
    return importlib.import_module("lancedb")


def _directory(tenant: str) -> str:
    # The name of a tenant may have any characters.
    return f"tenant-{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"There is no knowledge base `{name}`.", param="name")
