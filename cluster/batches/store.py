"""SQLite database of files, batches and results, and the directory of the files' contents.

All routers of a machine share it. Every method is one transaction, blocks on the disk, and may be
called by any thread; it raises ``sqlite3.Error`` or ``OSError`` if the database cannot be used. A
batch is a JSON document, so another database needs four tables and no migrations.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import msgspec

from cluster.batches.lines import LineResult
from cluster.batches.types import Batch, StoredFile
from cluster.errors import OverloadedError, PayloadTooLargeError

_BUSY_TIMEOUT_S = 10.0
_ROWS_BYTES = 1024 * 1024
"""Results that are read from the database at once; the last one may exceed it."""
_ABANDONED_S = 24 * 3600
"""Age of a file without an entry in the database after which it is deleted, in seconds."""
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, tenant TEXT, purpose TEXT, bytes INTEGER, created_at INTEGER,
  expires_at INTEGER, document BLOB);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, created_at);
CREATE TABLE IF NOT EXISTS batches (
  id TEXT PRIMARY KEY, tenant TEXT, created_at INTEGER, is_final INTEGER, document BLOB);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, created_at);
CREATE TABLE IF NOT EXISTS results (
  batch TEXT, line INTEGER, is_success INTEGER, content BLOB, PRIMARY KEY (batch, line));
CREATE TABLE IF NOT EXISTS lease (name TEXT PRIMARY KEY, owner TEXT, expires_at REAL);
"""
_LEASE = """
INSERT INTO lease VALUES ('runner', ?, ?) ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner, expires_at = excluded.expires_at
WHERE owner = excluded.owner OR expires_at < ? OR expires_at > ?
"""
_MAX_LEASES_AHEAD = 10
"""Durations of the lease by which its end may lie ahead; further only if a clock was set back."""

_encode = msgspec.json.Encoder().encode
_decode_file = msgspec.json.Decoder(StoredFile).decode
_decode_batch = msgspec.json.Decoder(Batch).decode


class Listing(NamedTuple):
    """Part of a list that a client asked for."""

    limit: int
    after: str | None = None
    """Id of the last item that the client has."""
    is_ascending: bool = False


class BatchStore:
    """Files, batches and their results.

    Args:
        directory: Directory of the database and the files; created on first use.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "batches.sqlite3"
        self._has_tables = False

    @property
    def exists(self) -> bool:
        """True once a file or batch was stored."""
        return self._has_tables or self._file.exists()

    def path(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._directory / "files" / file_id

    # -- files --

    def add_file(self, file: StoredFile, temporary: Path, max_tenant_bytes: int) -> None:
        """Add a file whose content is in ``temporary``, which is moved.

        Raises:
            PayloadTooLargeError: The tenant's files would exceed their limit.
        """
        with self._transaction() as database:
            found = database.execute(
                "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ?", (file.tenant,)
            )
            ((used,),) = found
            if used + file.bytes > max_tenant_bytes:
                raise PayloadTooLargeError(
                    f"The files of this tenant have {used} bytes, and this one {file.bytes}; the "
                    f"limit is {max_tenant_bytes} (router.batches.max_tenant_bytes). Delete some."
                )
            _insert_file(database, file)
            os.replace(temporary, self.path(file.id))

    def find_file(self, id_: str, tenant: str) -> StoredFile | None:
        """Return a file of a tenant; None if it has none with this id."""
        with self._transaction("DEFERRED") as database:
            rows = database.execute(
                "SELECT document FROM files WHERE id = ? AND tenant = ?", (id_, tenant)
            )
            return next((_decode_file(content) for (content,) in rows), None)

    def list_files(self, tenant: str, purpose: str | None, part: Listing) -> list[StoredFile]:
        """Return files of a tenant, newest first unless ``part`` says otherwise."""
        where, values = "tenant = ? AND (? IS NULL OR purpose = ?)", (tenant, purpose, purpose)
        return [_decode_file(content) for content in self._list("files", where, values, part)]

    def delete_file(self, id_: str, tenant: str) -> bool:
        """Delete a file of a tenant; return False if it has none with this id."""
        with self._transaction() as database:
            done = database.execute("DELETE FROM files WHERE id = ? AND tenant = ?", (id_, tenant))
            if not done.rowcount:
                return False
        self.path(id_).unlink(missing_ok=True)
        return True

    def delete_old(self, now_s: float, oldest_batch_s: float) -> None:
        """Delete expired files, those without an entry, and batches that are older than a time."""
        inputs = {batch.input_file_id for batch in self.open_batches()}
        with self._transaction() as database:
            rows = database.execute("SELECT id FROM files WHERE expires_at < ?", (now_s,))
            expired = [id_ for (id_,) in rows if id_ not in inputs]
            database.executemany("DELETE FROM files WHERE id = ?", [(id_,) for id_ in expired])
            database.execute(
                "DELETE FROM batches WHERE is_final AND created_at < ?", (oldest_batch_s,)
            )
            # A batch that lost its input has failed without an output.
            database.execute(
                "DELETE FROM results WHERE batch NOT IN (SELECT id FROM batches WHERE NOT is_final)"
            )
            kept = {id_ for (id_,) in database.execute("SELECT id FROM files")}
        for path in self.path("").iterdir():
            with suppress(FileNotFoundError):
                is_abandoned = path.stat().st_mtime < now_s - _ABANDONED_S
                if path.name in expired or (is_abandoned and path.name not in kept):
                    path.unlink()

    # -- batches --

    def add_batch(self, batch: Batch, max_open: int) -> None:
        """Add a new batch.

        Raises:
            OverloadedError: The tenant has ``max_open`` batches that have not ended.
        """
        with self._transaction() as database:
            ((num,),) = database.execute(
                "SELECT count(*) FROM batches WHERE tenant = ? AND NOT is_final", (batch.tenant,)
            )
            if num >= max_open:
                raise OverloadedError(
                    f"This tenant has {num} batches that have not ended; the limit is {max_open}. "
                    "Wait for one, or cancel one.",
                    retry_after_s=60,
                )
            values = batch.id, batch.tenant, batch.created_at, batch.is_final, _encode(batch)
            database.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", values)

    def find_batch(self, id_: str, tenant: str | None = None) -> Batch | None:
        """Return a batch, if given only if it is this tenant's; None without one."""
        with self._transaction("DEFERRED") as database:
            batch = _find_batch(database, id_)
        return batch if batch is not None and tenant in (None, batch.tenant) else None

    def list_batches(self, tenant: str, part: Listing) -> list[Batch]:
        """Return batches of a tenant, newest first unless ``part`` says otherwise."""
        found = self._list("batches", "tenant = ?", (tenant,), part)
        return [_decode_batch(content) for content in found]

    def open_batches(self) -> list[Batch]:
        """Return the batches of all tenants that are not finished, oldest first."""
        if not self.exists:
            return []
        query = "SELECT document FROM batches WHERE NOT is_final ORDER BY created_at, rowid"
        with self._transaction("DEFERRED") as database:
            return [_decode_batch(content) for (content,) in database.execute(query)]

    def change_batch(self, id_: str, change: Callable[[Batch], Batch]) -> Batch | None:
        """Replace a batch by ``change`` of it, unless it is finished; return what is stored."""
        with self._transaction() as database:
            batch = _find_batch(database, id_)
            if batch is None or batch.is_final:
                return batch
            return _write_batch(database, change(batch))

    # -- results --

    def record(self, id_: str, results: Iterable[LineResult]) -> Batch | None:
        """Store results of a batch that is not finished; a line keeps its first result."""
        with self._transaction() as database:
            batch = _find_batch(database, id_)
            if batch is None or batch.is_final:
                return batch
            for result in results:
                values = id_, result.line, result.is_success, result.content
                done = database.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", values)
                if done.rowcount:
                    batch = _count(batch, result)
            return _write_batch(database, batch)

    def done_lines(self, id_: str) -> set[int]:
        """Return the numbers of the lines that have a result."""
        with self._transaction("DEFERRED") as database:
            rows = database.execute("SELECT line FROM results WHERE batch = ?", (id_,))
            return {line for (line,) in rows}

    def finish(self, id_: str, change: Callable[[Batch], Batch], file_expires_at: int) -> None:
        """Write the output and error files of a batch and finish it; all of it or nothing.

        Args:
            id_: The batch; nothing happens if it is finished already.
            change: Returns its final state.
            file_expires_at: Unix time until which the files are kept.
        """
        batch = self.find_batch(id_)
        if batch is None or batch.is_final:
            return
        written = [
            (file_id, name, self._write_results(batch, file_id, is_success=is_success))
            for file_id, name, is_success in (
                (batch.output_id, "output", True),
                (batch.error_id, "error", False),
            )
        ]
        with self._transaction() as database:
            batch = _find_batch(database, id_)
            if batch is None or batch.is_final:
                return
            after = change(batch)
            for file_id, name, part in written:
                if not (size := part.stat().st_size):
                    part.unlink()
                    continue
                created_at = after.finalizing_at or after.created_at
                filename = f"{batch.id}_{name}.jsonl"
                file = StoredFile(
                    id=file_id,
                    tenant=batch.tenant,
                    filename=filename,
                    purpose="batch_output",
                    bytes=size,
                    created_at=created_at,
                    expires_at=file_expires_at,
                )
                _insert_file(database, file)
                os.replace(part, self.path(file_id))
            _write_batch(database, after)
            database.execute("DELETE FROM results WHERE batch = ?", (id_,))

    def _write_results(self, batch: Batch, file_id: str, *, is_success: bool) -> Path:
        part = self.path(f"{file_id}.{token_hex(4)}.part")  # another router may write it, too
        with part.open("wb") as file:
            for content in self._results(batch.id, is_success=is_success):
                file.write(content)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
        return part

    def _results(self, id_: str, *, is_success: bool) -> Iterator[bytes]:
        query = """SELECT line, content FROM results WHERE batch = ? AND is_success = ? AND line > ?
            ORDER BY line"""
        last = 0
        while True:
            found: list[bytes] = []
            size = 0
            with self._transaction("DEFERRED") as database:
                for line, content in database.execute(query, (id_, is_success, last)):
                    found.append(content)
                    last, size = line, size + len(content)
                    if size >= _ROWS_BYTES:
                        break
            if not found:
                return
            yield from found

    # -- lease --

    def take_lease(self, owner: str, now_s: float, duration_s: float) -> bool:
        """Take or renew the lease of the router that runs batches; return False if it is taken."""
        latest_s = now_s + _MAX_LEASES_AHEAD * duration_s
        with self._transaction() as database:
            done = database.execute(_LEASE, (owner, now_s + duration_s, now_s, latest_s))
            return bool(done.rowcount)

    def drop_lease(self, owner: str) -> None:
        """Give up the lease, if this owner has it."""
        with self._transaction() as database:
            database.execute("DELETE FROM lease WHERE owner = ?", (owner,))

    def _list(self, table: str, where: str, values: Sequence[object], part: Listing) -> list[bytes]:
        order, sign = ("ASC", ">") if part.is_ascending else ("DESC", "<")
        query = f"""SELECT document FROM {table} WHERE {where} AND (? IS NULL OR (created_at, rowid)
            {sign} (SELECT created_at, rowid FROM {table} WHERE id = ?))
            ORDER BY created_at {order}, rowid {order} LIMIT ?"""
        with self._transaction("DEFERRED") as database:
            rows = database.execute(query, (*values, part.after, part.after, part.limit))
            return [content for (content,) in rows]

    @contextmanager
    def _transaction(self, mode: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        if not self._has_tables:
            self.path("").mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(self._file, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        with closing(connection) as database:
            if not self._has_tables:
                database.executescript(f"BEGIN IMMEDIATE;{_TABLES}COMMIT;")
                self._has_tables = True
            database.execute(f"BEGIN {mode}")
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # not after a full disk
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _insert_file(database: sqlite3.Connection, file: StoredFile) -> None:
    values = file.id, file.tenant, file.purpose, file.bytes, file.created_at, file.expires_at
    document = _encode(file)
    database.execute(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, document)
    )


def _find_batch(database: sqlite3.Connection, id_: str) -> Batch | None:
    rows = database.execute("SELECT document FROM batches WHERE id = ?", (id_,))
    return next((_decode_batch(content) for (content,) in rows), None)


def _write_batch(database: sqlite3.Connection, batch: Batch) -> Batch:
    values = batch.is_final, _encode(batch), batch.id
    database.execute("UPDATE batches SET is_final = ?, document = ? WHERE id = ?", values)
    return batch


def _count(batch: Batch, result: LineResult) -> Batch:
    usage = result.usage
    counts = {
        "completed": batch.completed + result.is_success,
        "failed": batch.failed + (not result.is_success),
    }
    if usage is None:
        return msgspec.structs.replace(batch, **counts)
    return msgspec.structs.replace(
        batch,
        **counts,
        prompt_tokens=batch.prompt_tokens + usage.prompt_tokens,
        cached_tokens=batch.cached_tokens + usage.cached_tokens,
        completion_tokens=batch.completion_tokens + usage.completion_tokens,
        joules=batch.joules + (usage.joules or 0.0),
        cost=batch.cost + (usage.cost or 0.0),
    )
