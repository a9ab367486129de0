"""SQLite database of batches, for all routers that share a directory."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from cluster.batches.database import TABLES, Rows, StoreError

_BUSY_TIMEOUT_S = 10.0


class SqliteTransaction:
    """Transaction, and the files to delete after it."""

    def __init__(self, connection: sqlite3.Connection, directory: Path) -> None:
        self._connection = connection
        self._directory = directory
        self.deleted: list[Path] = []

    def execute(self, query: str, values: Sequence[object] = ()) -> Rows:
        return self._connection.execute(query, values)

    def lock(self, name: str) -> None:
        """Do nothing, as transactions that write exclude each other."""

    def put_content(self, file_id: str, part: Path) -> None:
        os.replace(part, self._directory / file_id)

    def delete_content(self, file_id: str) -> None:
        self.deleted.append(self._directory / file_id)


class SqliteDatabase:
    """A database file, and a directory of the files' contents.

    Args:
        directory: Directory of both; created on first use.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "files"
        self._file = directory / "batches.sqlite3"
        self._has_tables = False

    @property
    def exists(self) -> bool:
        return self._has_tables or self._file.exists()

    @contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[SqliteTransaction]:
        if not self._has_tables:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            connection = sqlite3.connect(self._file, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            with closing(connection):
                if not self._has_tables:
                    connection.executescript(f"BEGIN IMMEDIATE;{';'.join(TABLES)};COMMIT;")
                    self._has_tables = True
                connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")
                transaction = SqliteTransaction(connection, self.directory)
                try:
                    yield transaction
                except BaseException:
                    if connection.in_transaction:  # not after a full disk
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreError(f"The database of batches cannot be used: {error}.") from error
        for path in transaction.deleted:
            path.unlink(missing_ok=True)

    def open_content(self, file_id: str) -> IO[bytes]:
        return (self.directory / file_id).open("rb")

    def close(self) -> None:
        """Do nothing; each transaction has its connection."""
