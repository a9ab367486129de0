"""Files, batches and results in a database, and the lease of the router that runs batches.

Every method blocks on the database and may be called by any thread; it raises ``StoreError`` or
``OSError`` if the database cannot be used. Every change is one transaction. A batch is a JSON
document, so the tables need no migrations.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, NamedTuple

import msgspec

from cluster.batches.database import Database, Transaction
from cluster.batches.lines import LineResult
from cluster.batches.types import Batch, StoredFile
from cluster.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
)

_ROWS_BYTES = 1024 * 1024
"""Results that are read from the database at once; the last one may exceed it."""
_ABANDONED_S = 24 * 3600
"""Age of a file without an entry in the database after which it is deleted, in seconds."""
_LEASE = """
INSERT INTO lease VALUES ('runner', ?, ?) ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner, expires_at = excluded.expires_at
WHERE lease.owner = excluded.owner OR lease.expires_at < ? OR lease.expires_at > ?
"""
_SIZES = """
SELECT line, length(content) FROM results WHERE batch = ? AND is_success = ? AND line > ?
ORDER BY line LIMIT 1000
"""
_CONTENTS = """
SELECT content FROM results WHERE batch = ? AND is_success = ? AND line > ? AND line <= ?
ORDER BY line
"""
_ADD_RESULT = "INSERT INTO results VALUES (?, ?, ?, ?) ON CONFLICT (batch, line) DO NOTHING"
_MAX_LEASES_AHEAD = 10
"""Durations of the lease by which its end may lie ahead; further only if a clock was set back."""

_HAS_FILE = "SELECT 1 FROM files WHERE id = ? AND tenant = ?"

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
        database: The database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def exists(self) -> bool:
        """False if no file or batch was stored yet."""
        return self._database.exists

    def part(self, file_id: str) -> Path:
        """Return the path of a file that is being received."""
        return self._database.directory / f"{file_id}.part"

    def open(self, file_id: str) -> IO[bytes]:
        """Open the content of a file.

        Raises:
            FileNotFoundError: It has no content; also while it is read, if it is deleted.
        """
        return self._database.open_content(file_id)

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    # -- files --

    def add_file(self, file: StoredFile, temporary: Path, max_tenant_bytes: int) -> None:
        """Add a file whose content is in ``temporary``, which is moved.

        Raises:
            PayloadTooLargeError: The tenant's files would exceed their limit.
        """
        query = "SELECT CAST(coalesce(sum(bytes), 0) AS BIGINT) FROM files WHERE tenant = ?"
        with self._database.transaction() as transaction:
            transaction.lock(f"tenant {file.tenant}")
            ((used,),) = transaction.execute(query, (file.tenant,))
            if used + file.bytes > max_tenant_bytes:
                raise PayloadTooLargeError(
                    f"The files of this tenant have {used} bytes, and this one {file.bytes}; the "
                    f"limit is {max_tenant_bytes} (router.batches.max_tenant_bytes). Delete some."
                )
            _insert_file(transaction, file)
            transaction.put_content(file.id, temporary)

    def find_file(self, id_: str, tenant: str) -> StoredFile | None:
        """Return a file of a tenant; None if it has none with this id."""
        with self._database.transaction(writes=False) as transaction:
            rows = transaction.execute(
                "SELECT document FROM files WHERE id = ? AND tenant = ?", (id_, tenant)
            )
            return next((_decode_file(content) for (content,) in rows), None)

    def list_files(self, tenant: str, purpose: str | None, part: Listing) -> list[StoredFile]:
        """Return files of a tenant, newest first unless ``part`` says otherwise."""
        where: dict[str, object] = {"tenant": tenant}
        if purpose is not None:
            where["purpose"] = purpose
        return [_decode_file(content) for content in self._list("files", where, part)]

    def delete_file(self, id_: str, tenant: str) -> bool:
        """Delete a file of a tenant; return False if it has none with this id.

        Raises:
            InvalidRequestError: A batch that has not ended reads it.
        """
        query = "DELETE FROM files WHERE id = ? AND tenant = ?"
        with self._database.transaction() as transaction:
            transaction.lock(f"tenant {tenant}")
            if (user := _users(transaction, tenant).get(id_)) is not None:
                raise InvalidRequestError(f"The file is in use by {user}. Cancel that first.")
            if not transaction.execute(query, (id_, tenant)).rowcount:
                return False
            transaction.delete_content(id_)
        return True

    def delete_old(self, now_s: float, oldest_batch_s: float) -> None:
        """Delete expired files, those without an entry, and batches that are older than a time."""
        self._delete_expired(now_s)
        with self._database.transaction() as transaction:
            query = "DELETE FROM batches WHERE is_final AND created_at < ?"
            transaction.execute(query, (oldest_batch_s,))
            # A batch that lost its input has failed without an output.
            transaction.execute(
                "DELETE FROM results WHERE batch NOT IN (SELECT id FROM batches WHERE NOT is_final)"
            )
            kept = {id_ for (id_,) in transaction.execute("SELECT id FROM files")}
        for path in self._database.directory.iterdir():
            with suppress(FileNotFoundError):
                is_old = path.stat().st_mtime < now_s - _ABANDONED_S
                if is_old and path.name not in kept:
                    path.unlink()

    def _delete_expired(self, now_s: float) -> None:
        query = "SELECT DISTINCT tenant FROM files WHERE expires_at < ?"
        with self._database.transaction(writes=False) as transaction:
            tenants = [tenant for (tenant,) in transaction.execute(query, (now_s,))]
        query = "SELECT id FROM files WHERE tenant = ? AND expires_at < ?"
        for tenant in tenants:
            with self._database.transaction() as transaction:
                transaction.lock(f"tenant {tenant}")
                users = _users(transaction, tenant)
                expired = [id_ for (id_,) in transaction.execute(query, (tenant, now_s))]
                for id_ in expired:
                    if id_ not in users:
                        transaction.execute("DELETE FROM files WHERE id = ?", (id_,))
                        transaction.delete_content(id_)

    # -- batches --

    def add_batch(self, batch: Batch, max_open: int) -> None:
        """Add a new batch.

        Raises:
            NotFoundError: The tenant does not have the input file.
            OverloadedError: The tenant has ``max_open`` batches that have not ended.
        """
        file = batch.input_file_id, batch.tenant
        query = "SELECT count(*) FROM batches WHERE tenant = ? AND NOT is_final"
        with self._database.transaction() as transaction:
            transaction.lock(f"tenant {batch.tenant}")  # its files are not deleted meanwhile
            if not list(transaction.execute(_HAS_FILE, file)):
                raise NotFoundError(f"No such file: {batch.input_file_id}.", param="file_id")
            ((num,),) = transaction.execute(query, (batch.tenant,))
            if num >= max_open:
                raise OverloadedError(
                    f"This tenant has {num} batches that have not ended; the limit is {max_open}. "
                    "Wait for one, or cancel one.",
                    retry_after_s=60,
                )
            values = batch.id, batch.tenant, batch.created_at, batch.is_final, _encode(batch)
            columns = "id, tenant, created_at, is_final, document"
            transaction.execute(f"INSERT INTO batches ({columns}) VALUES (?, ?, ?, ?, ?)", values)

    def find_batch(self, id_: str, tenant: str | None = None) -> Batch | None:
        """Return a batch, if given only if it is this tenant's; None without one."""
        with self._database.transaction(writes=False) as transaction:
            batch = _find_batch(transaction, id_)
        return batch if batch is not None and tenant in (None, batch.tenant) else None

    def list_batches(self, tenant: str, part: Listing) -> list[Batch]:
        """Return batches of a tenant, newest first unless ``part`` says otherwise."""
        found = self._list("batches", {"tenant": tenant}, part)
        return [_decode_batch(content) for content in found]

    def open_batches(self) -> list[Batch]:
        """Return the batches of all tenants that are not finished, oldest first."""
        if not self.exists:
            return []
        query = "SELECT document FROM batches WHERE NOT is_final ORDER BY created_at, rowid"
        with self._database.transaction(writes=False) as transaction:
            return [_decode_batch(content) for (content,) in transaction.execute(query)]

    def change_batch(self, id_: str, change: Callable[[Batch], Batch]) -> Batch | None:
        """Replace a batch by ``change`` of it, unless it is finished; return what is stored."""
        with self._database.transaction() as transaction:
            transaction.lock(f"batch {id_}")
            batch = _find_batch(transaction, id_)
            if batch is None or batch.is_final:
                return batch
            return _write_batch(transaction, change(batch))

    # -- results --

    def record(self, id_: str, results: Iterable[LineResult]) -> Batch | None:
        """Store results of a batch that is not finished; a line keeps its first result."""
        with self._database.transaction() as transaction:
            transaction.lock(f"batch {id_}")
            batch = _find_batch(transaction, id_)
            if batch is None or batch.is_final:
                return batch
            for result in results:
                values = id_, result.line, result.is_success, result.content
                if transaction.execute(_ADD_RESULT, values).rowcount:
                    batch = _count(batch, result)
            return _write_batch(transaction, batch)

    def done_lines(self, id_: str) -> set[int]:
        """Return the numbers of the lines that have a result."""
        with self._database.transaction(writes=False) as transaction:
            rows = transaction.execute("SELECT line FROM results WHERE batch = ?", (id_,))
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
        # Another router may write the same files.
        output, errors = (
            self.part(f"{file_id}.{token_hex(4)}") for file_id in (batch.output_id, batch.error_id)
        )
        try:
            self._write_results(output, id_, is_success=True)
            self._write_results(errors, id_, is_success=False)
            with self._database.transaction() as transaction:
                transaction.lock(f"batch {id_}")
                batch = _find_batch(transaction, id_)
                if batch is None or batch.is_final:
                    return
                after = change(batch)
                _put_output(transaction, after, "output", output, file_expires_at)
                _put_output(transaction, after, "error", errors, file_expires_at)
                _write_batch(transaction, after)
                transaction.execute("DELETE FROM results WHERE batch = ?", (id_,))
        finally:
            for part in (output, errors):
                part.unlink(missing_ok=True)

    def _write_results(self, part: Path, id_: str, *, is_success: bool) -> None:
        with part.open("wb") as file:
            for content in self._results(id_, is_success=is_success):
                file.write(content)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _results(self, id_: str, *, is_success: bool) -> Iterator[bytes]:
        start, end = 0, 0
        while True:
            with self._database.transaction(writes=False) as transaction:
                num_bytes = 0
                for line, size in transaction.execute(_SIZES, (id_, is_success, start)):
                    end, num_bytes = line, num_bytes + size
                    if num_bytes >= _ROWS_BYTES:
                        break
                found = list(transaction.execute(_CONTENTS, (id_, is_success, start, end)))
            if not found:
                return
            start = end
            yield from (content for (content,) in found)
            found.clear()  # before the next ones are read

    # -- lease --

    def take_lease(self, owner: str, now_s: float, duration_s: float) -> bool:
        """Take or renew the lease of the router that runs batches; return False if it is taken."""
        latest_s = now_s + _MAX_LEASES_AHEAD * duration_s
        with self._database.transaction() as transaction:
            done = transaction.execute(_LEASE, (owner, now_s + duration_s, now_s, latest_s))
            return bool(done.rowcount)

    def drop_lease(self, owner: str) -> None:
        """Give up the lease, if this owner has it."""
        with self._database.transaction() as transaction:
            transaction.execute("DELETE FROM lease WHERE owner = ?", (owner,))

    def _list(self, table: str, where: dict[str, object], part: Listing) -> list[bytes]:
        order, sign = ("ASC", ">") if part.is_ascending else ("DESC", "<")
        conditions, values = [f"{column} = ?" for column in where], [*where.values()]
        if part.after is not None:
            last = f"SELECT created_at, rowid FROM {table} WHERE id = ?"
            conditions.append(f"(created_at, rowid) {sign} ({last})")
            values.append(part.after)
        query = f"""SELECT document FROM {table} WHERE {" AND ".join(conditions)}
            ORDER BY created_at {order}, rowid {order} LIMIT ?"""
        with self._database.transaction(writes=False) as transaction:
            return [content for (content,) in transaction.execute(query, (*values, part.limit))]


def _insert_file(transaction: Transaction, file: StoredFile) -> None:
    columns = "id, tenant, purpose, bytes, created_at, expires_at, document"
    values = file.id, file.tenant, file.purpose, file.bytes, file.created_at, file.expires_at
    query = f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)"
    transaction.execute(query, (*values, _encode(file)))


def _users(transaction: Transaction, tenant: str) -> dict[str, str]:
    """Return the input files of a tenant's open batches, and a batch of each."""
    query = "SELECT document FROM batches WHERE tenant = ? AND NOT is_final"
    batches = [_decode_batch(content) for (content,) in transaction.execute(query, (tenant,))]
    return {batch.input_file_id: batch.id for batch in reversed(batches)}


def _put_output(
    transaction: Transaction, batch: Batch, kind: str, part: Path, expires_at: int
) -> None:
    """Add the output file or the error file of a batch, unless it is empty."""
    if not (size := part.stat().st_size):
        return
    file = StoredFile(
        id=batch.output_id if kind == "output" else batch.error_id,
        tenant=batch.tenant,
        filename=f"{batch.id}_{kind}.jsonl",
        purpose="batch_output",
        bytes=size,
        created_at=batch.finalizing_at or batch.created_at,
        expires_at=expires_at,
    )
    _insert_file(transaction, file)
    transaction.put_content(file.id, part)


def _find_batch(transaction: Transaction, id_: str) -> Batch | None:
    rows = transaction.execute("SELECT document FROM batches WHERE id = ?", (id_,))
    return next((_decode_batch(content) for (content,) in rows), None)


def _write_batch(transaction: Transaction, batch: Batch) -> Batch:
    values = batch.is_final, _encode(batch), batch.id
    transaction.execute("UPDATE batches SET is_final = ?, document = ? WHERE id = ?", values)
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
