"""Interface of the databases of batches, and the error of all of them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol

from cluster.errors import UnavailableError

TABLES = (
    """CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT, purpose TEXT, bytes BIGINT, created_at BIGINT,
    expires_at BIGINT, document BYTEA)""",
    "CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, created_at)",
    """CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, tenant TEXT, created_at BIGINT, is_final BOOLEAN, document BYTEA)""",
    "CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, created_at)",
    """CREATE TABLE IF NOT EXISTS results (
    batch TEXT, line BIGINT, is_success BOOLEAN, content BYTEA, PRIMARY KEY (batch, line))""",
    "CREATE TABLE IF NOT EXISTS lease (name TEXT PRIMARY KEY, owner TEXT, expires_at FLOAT)",
)
"""Tables in the common dialect. Each also has SQLite's column ``rowid``, in order of insertion."""


class StoreError(UnavailableError):
    """The database of batches cannot be used now."""


class Rows(Protocol):
    """Result of a statement."""

    @property
    def rowcount(self) -> int:
        """Changed rows."""

    def __iter__(self) -> Iterator[Any]: ...


class Transaction(Protocol):
    """An open transaction; contents of files are part of it."""

    def execute(self, query: str, values: Sequence[object] = (), /) -> Rows:
        """Run a statement with ``?`` for each value."""

    def lock(self, name: str, /) -> None:
        """Wait until no other transaction has this lock, and keep it until the end."""

    def put_content(self, file_id: str, part: Path, /) -> None:
        """Store the file ``part`` as content and delete ``part``."""

    def delete_content(self, file_id: str, /) -> None:
        """Delete the content of a file, if there is one."""


class Database(Protocol):
    """A database with ``TABLES`` and the contents of files. Any thread may call it.

    Its methods and transactions raise ``StoreError`` or ``OSError`` if it cannot be used.
    """

    @property
    def directory(self) -> Path:
        """Directory on this node of files that are being written."""

    @property
    def exists(self) -> bool:
        """False if nothing was stored yet."""

    def transaction(self, *, writes: bool = True) -> AbstractContextManager[Transaction]:
        """Return a transaction, which an exception undoes."""

    def open_content(self, file_id: str, /) -> IO[bytes]:
        """Open the content of a file.

        Raises:
            FileNotFoundError: It has no content; also while it is read, if it is deleted.
        """

    def close(self) -> None:
        """Close the connections; a further call opens new ones."""
