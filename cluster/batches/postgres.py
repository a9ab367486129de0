"""PostgreSQL database of batches and of the files' contents, for routers on several nodes."""

import io
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from cluster.batches.database import TABLES, Rows, StoreError

logger = logging.getLogger("ray.serve.tandem")

CHUNK_BYTES = 1024 * 1024
"""Content of a file in one row; PostgreSQL sends whole rows."""
LOG_S = 60.0
"""Interval in which failures of one kind are logged once, in seconds."""
_RETRY_S = 5.0
"""Time after which clients try again, in seconds; that of batches (``RETRY_S`` of the runner)."""
_OPTIONS: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 15_000,
    # An INSERT writes at most a chunk; a DELETE may take all chunks of a file or all results of
    # ended batches. A router that was lost or suspended in a transaction gives up its locks.
    "options": "-c statement_timeout=30s -c idle_in_transaction_session_timeout=30s",
    "application_name": "tandem-batches",
}
"""Options of connections that the URL may override."""
_CONTENTS = (
    *(
        f"ALTER TABLE {table} ADD COLUMN rowid BIGINT GENERATED ALWAYS AS IDENTITY"
        for table in ("files", "batches")
    ),
    """CREATE TABLE contents (
    file TEXT, number BIGINT, content BYTEA, PRIMARY KEY (file, number))""",
)
_LAST_TABLE = "contents"
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"

Connection = psycopg.Connection[tuple[Any, ...]]


class PostgresTransaction:
    """Transaction of a connection."""

    def __init__(self, connection: Connection, schema: str) -> None:
        self._connection = connection
        self._schema = schema

    def execute(self, query: str, values: Sequence[object] = ()) -> Rows:
        cursor = self._connection.cursor(binary=True)
        return cursor.execute(query.replace("?", "%s").encode(), values)

    def lock(self, name: str) -> None:
        self._connection.execute(_LOCK, (f"{self._schema} {name}",))

    def put_content(self, file_id: str, part: Path) -> None:
        with part.open("rb") as file:
            number = 0
            # An empty file has one row, too.
            while (chunk := file.read(CHUNK_BYTES)) or not number:
                self.execute("INSERT INTO contents VALUES (?, ?, ?)", (file_id, number, chunk))
                number += 1
        part.unlink()  # if the commit fails, its caller writes or receives it again

    def delete_content(self, file_id: str) -> None:
        self.execute("DELETE FROM contents WHERE file = ?", (file_id,))


class _FailureLog:
    """Log of failures, at most one of a kind in ``LOG_S``. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged_at_s: dict[type[psycopg.Error], float] = {}

    def log(self, error: psycopg.Error) -> None:
        kind, now_s = type(error), time.monotonic()
        with self._lock:
            is_new = now_s - self._logged_at_s.get(kind, -math.inf) >= LOG_S
            if is_new:
                self._logged_at_s[kind] = now_s
        if is_new:
            logger.error("batches: the database failed: %s", " ".join(str(error).split()))


class PostgresDatabase:
    """A schema in a PostgreSQL database; connections are kept.

    Args:
        url: ``postgresql://…``, or any other connection string of libpq.
        schema: Schema of the tables; created on first use.
        directory: Directory on this node of files that are being written.
    """

    exists = True

    def __init__(self, url: str, schema: str, directory: Path) -> None:
        self.directory = directory / "files"
        self._options = {**_OPTIONS, **conninfo_to_dict(url)}
        self._schema = schema
        self._idle: deque[Connection] = deque()
        self._has_tables = False
        self._failures = _FailureLog()

    @contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[PostgresTransaction]:
        if not self._has_tables:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            connection = self._begin()
            try:
                yield PostgresTransaction(connection, self._schema)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._keep(connection)
        except psycopg.Error as error:
            self._failures.log(error)
            # libpq's text names the host and the user, which are not for clients.
            raise StoreError(
                "The database of batches is unavailable; try again.", retry_after_s=_RETRY_S
            ) from error

    def _begin(self) -> Connection:
        """Return a connection with an open transaction."""
        while self._idle:
            connection = self._idle.pop()
            try:
                connection.execute("BEGIN")
            except psycopg.OperationalError:  # the server has restarted, for example
                connection.close()
            else:
                return connection
        connection = psycopg.connect(**self._options, autocommit=True, prepare_threshold=None)
        try:
            schema = sql.Identifier(self._schema)
            connection.execute(sql.SQL("SET search_path TO {}").format(schema))
            if not self._has_tables:
                self._create_tables(connection, schema)
                self._has_tables = True
            connection.execute("BEGIN")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create_tables(self, connection: Connection, schema: sql.Identifier) -> None:
        with connection.transaction():
            # PostgreSQL does not expect that two sessions create the same table.
            connection.execute(_LOCK, (f"{self._schema} tables",))
            # Even if nothing is left to do, the statements lock tables against the transactions of
            # other routers, which then can deadlock.
            if connection.execute("SELECT to_regclass(%s)", (_LAST_TABLE,)).fetchone() != (None,):
                return
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
            for statement in (*TABLES, *_CONTENTS):
                connection.execute(statement.encode())

    def _keep(self, connection: Connection) -> None:
        is_idle = connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
        if connection.closed or not is_idle:
            connection.close()
        else:
            self._idle.append(connection)

    def open_content(self, file_id: str) -> IO[bytes]:
        return io.BufferedReader(_ContentReader(self, file_id), CHUNK_BYTES)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _ContentReader(io.RawIOBase):
    """Content of a file, read row by row, each in another transaction."""

    def __init__(self, database: PostgresDatabase, file_id: str) -> None:
        self._database = database
        self._file_id = file_id
        with database.transaction(writes=False) as transaction:
            query = "SELECT max(number) FROM contents WHERE file = ?"
            ((self._last,),) = transaction.execute(query, (file_id,))
        if self._last is None:
            raise FileNotFoundError(file_id)
        self._number = 0
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and self._number <= self._last:
            self._rest = memoryview(self._read_chunk())
            self._number += 1
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def _read_chunk(self) -> bytes:
        with self._database.transaction(writes=False) as transaction:
            query = "SELECT content FROM contents WHERE file = ? AND number = ?"
            for (content,) in transaction.execute(query, (self._file_id, self._number)):
                return bytes(content)
        raise FileNotFoundError(self._file_id)
