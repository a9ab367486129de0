"""Choice of the database of batches."""

import hashlib
import re
from pathlib import Path

from cluster.batches.database import Database
from cluster.batches.sqlite import SqliteDatabase
from cluster.batches.store import BatchStore
from cluster.errors import ConfigError

_MAX_SCHEMA_CHARS = 60
"""Characters of a schema's name; PostgreSQL cuts names after 63 bytes."""


def open_store(directory: Path, url: str | None = None, application: str = "tandem") -> BatchStore:
    """Return the store of an application's batches; nothing is opened yet.

    Args:
        directory: Directory of SQLite's database and the files, or only of unfinished files.
        url: URL of the PostgreSQL database that keeps all; SQLite by default.
        application: Name of the application, which names PostgreSQL's schema.

    Raises:
        ConfigError: The client of PostgreSQL is not installed.
    """
    if url is None:
        return BatchStore(SqliteDatabase(directory))
    try:
        from cluster.batches.postgres import PostgresDatabase
    except ImportError as error:
        raise ConfigError(
            f"router.batches.database needs PostgreSQL's client ({error}). Install the extra: "
            "pip install 'tandem[postgres]'"
        ) from error
    database: Database = PostgresDatabase(url, _schema_of(application), directory)
    return BatchStore(database)


def _schema_of(application: str) -> str:
    schema = f"tandem_{re.sub(r'[^a-z0-9]', '_', application.lower())}"
    if schema == f"tandem_{application}" and len(schema) <= _MAX_SCHEMA_CHARS:
        return schema
    digest = hashlib.sha256(application.encode()).hexdigest()[:8]  # ``a-b`` is not ``a.b``
    return f"{schema[: _MAX_SCHEMA_CHARS - 9]}_{digest}"
