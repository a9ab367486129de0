"""The store of batches: one result per line after any crash, isolation, limits and the lease."""

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from cluster.batches import Batch, BatchStore, LineResult, Listing, StoredFile
from cluster.batches.postgres import PostgresTransaction
from cluster.batches.sqlite import SqliteTransaction
from cluster.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
)
from cluster.usage import Usage
from tests.serve.batch_place import Place

replace = msgspec.structs.replace


class Crash(BaseException):
    """End of the process at this point."""


@pytest.fixture
def store(place: Place) -> BatchStore:
    return place.open()


def read(store: BatchStore, id_: str) -> bytes:
    with store.open(id_) as file:
        return file.read()


def has_content(store: BatchStore, id_: str) -> bool:
    try:
        return bool(read(store, id_))
    except FileNotFoundError:
        return False


def add_file(store: BatchStore, id_: str, content: bytes = b"x", **fields: Any) -> StoredFile:
    about = {"tenant": "a", "filename": "in.jsonl", "purpose": "batch", "created_at": 1}
    file = StoredFile(**{"id": id_, "bytes": len(content), "expires_at": 100, **about, **fields})
    part = store.part(id_)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    store.add_file(file, part, 10)
    return file


def make_batch(id_: str = "b", **fields: Any) -> Batch:
    about = {"tenant": "a", "endpoint": "/classify", "input_file_id": "f", "created_at": 1}
    ids = {"output_id": f"{id_}-out", "error_id": f"{id_}-err", "expires_at": 99}
    return Batch(**{"id": id_, "completion_window": "1h", "total": 3, **about, **ids, **fields})


def add_batch(store: BatchStore, batch: Batch, max_open: int = 9) -> None:
    """Add a batch, and its input file if there is none."""
    if store.find_file(batch.input_file_id, batch.tenant) is None:
        batch = replace(batch, input_file_id=f"{batch.tenant}-in")
    if store.find_file(batch.input_file_id, batch.tenant) is None:
        add_file(store, batch.input_file_id, b"", tenant=batch.tenant, expires_at=10**12)
    store.add_batch(batch, max_open)


def result(line: int, content: bytes = b"{}", *, good: bool = True) -> LineResult:
    return LineResult(line, good, content, Usage(2, 1, 3, cost=0.5) if good else None)


def end(batch: Batch) -> Batch:
    return replace(batch, status="completed", completed_at=9)


def test_a_line_keeps_its_first_result(store: BatchStore) -> None:
    add_batch(store, make_batch(), 9)
    store.record("b", [result(1, b'"first"'), result(2, good=False)])
    batch = store.record("b", [result(1, b'"second"'), result(1, good=False), result(3)])
    assert batch is not None
    assert (batch.completed, batch.failed, batch.completion_tokens) == (2, 1, 6)
    assert batch.as_json("EUR")["tandem"]["cost"] == 1.0
    assert store.done_lines("b") == {1, 2, 3}
    store.finish("b", end, 50)
    assert read(store, "b-out") == b'"first"\n{}\n'
    assert read(store, "b-err") == b"{}\n"


@pytest.mark.parametrize("point", ["write", "first content", "second content", "commit"])
def test_a_crash_at_the_end_loses_and_doubles_nothing(
    store: BatchStore,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    add_batch(store, make_batch(), 9)
    store.record("b", [result(line, b"%d" % line, good=line < 3) for line in (1, 2, 3)])
    num_stored = 0

    def crash(*_: object) -> None:
        raise Crash

    def crash_after(put: Callable[..., None]) -> Callable[..., None]:
        def put_content(*arguments: object) -> None:
            nonlocal num_stored
            put(*arguments)
            num_stored += 1
            if num_stored == {"first content": 1, "second content": 2}.get(point):
                raise Crash

        return put_content

    with monkeypatch.context() as patch:
        for kind in (SqliteTransaction, PostgresTransaction):
            patch.setattr(kind, "put_content", crash_after(kind.put_content))
        if point == "write":
            patch.setattr("cluster.batches.store.os.fsync", crash)
        if point == "commit":
            patch.setattr("cluster.batches.store._write_batch", crash)
        with pytest.raises(Crash):
            store.finish("b", end, 50)
    (batch,) = place.open().open_batches()
    assert batch.completed == 2
    for _ in range(2):  # also if it is finished twice
        place.open().finish("b", end, 50)
    assert read(store, "b-out") == b"1\n2\n"
    assert read(store, "b-err") == b"3\n"
    assert store.open_batches() == []
    output = store.find_file("b-out", "a")
    assert output is not None
    assert (output.purpose, output.bytes) == ("batch_output", 4)


@pytest.mark.parametrize("point", ["write", "transaction", "final"])
def test_an_end_that_fails_leaves_no_parts(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    add_batch(store, make_batch(), 9)
    store.record("b", [result(1), result(2, good=False)])

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    def end_elsewhere(*_: object) -> None:
        store.change_batch("b", end)

    with monkeypatch.context() as patch:
        if point == "transaction":
            for kind in (SqliteTransaction, PostgresTransaction):
                patch.setattr(kind, "lock", fail)
        else:
            meanwhile = fail if point == "write" else end_elsewhere
            patch.setattr("cluster.batches.store.os.fsync", meanwhile)
        with nullcontext() if point == "final" else pytest.raises(OSError, match="full"):
            store.finish("b", end, 50)
    assert list(store.part("").parent.glob("*.part")) == []


RECORD = """
import sys, time
from pathlib import Path
from cluster.batches import LineResult, open_store

directory, url, application, word = sys.argv[1:]
store = open_store(Path(directory), url or None, application)
for line in range(1, 100_000):
    store.record("b", [LineResult(line, True, b'"%d %s"' % (line, word.encode()))])
    print(line, flush=True)
    time.sleep(0.02)  # SQLite lets a process that always writes starve the other
"""


def test_two_processes_that_are_killed_leave_one_result_per_line(
    store: BatchStore, place: Place
) -> None:
    add_batch(store, make_batch(total=100_000), 9)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RECORD, place.next_directory(), place.url, place.name, word],
            stdout=subprocess.PIPE,
        )
        for word in ("one", "two")
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            while int(writer.stdout.readline()) < 10:
                pass
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    batch = store.find_batch("b")
    assert batch is not None
    assert batch.completed >= 10
    assert store.done_lines("b") == set(range(1, batch.completed + 1))
    store.finish("b", end, 50)
    found = [json.loads(each).split() for each in read(store, "b-out").splitlines()]
    assert [int(line) for line, _ in found] == list(range(1, batch.completed + 1))


def test_a_crash_during_recording_keeps_none_of_it(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_batch(store, make_batch(), 9)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("cluster.batches.store._write_batch", crash)
        with pytest.raises(Crash):
            store.record("b", [result(1)])
    assert store.done_lines("b") == set()
    batch = store.record("b", [result(1)])
    assert batch is not None
    assert batch.completed == 1


def test_a_finished_batch_does_not_change(store: BatchStore) -> None:
    add_batch(store, make_batch(), 9)
    store.finish("b", end, 50)
    after = store.change_batch("b", lambda batch: replace(batch, status="cancelling"))
    assert after is not None
    assert after.status == "completed"
    assert store.record("b", [result(1)]) == after
    assert after.as_json(None)["output_file_id"] is None


def test_each_tenant_sees_its_own(store: BatchStore) -> None:
    add_file(store, "f")
    add_batch(store, make_batch(), 9)
    assert store.find_file("f", "other") is None
    assert not store.delete_file("f", "other")
    assert store.find_batch("b", "other") is None
    assert store.list_batches("other", Listing(10)) == []
    assert store.list_files("other", None, Listing(10)) == []
    store.finish("b", end, 50)
    assert store.delete_file("f", "a")
    assert not has_content(store, "f")


def test_lists_are_in_order_and_go_on_after_an_item(store: BatchStore) -> None:
    for number in range(5):
        add_batch(store, make_batch(f"b{number}", created_at=number // 2), 9)

    def ids(part: Listing) -> list[str]:
        return [batch.id for batch in store.list_batches("a", part)]

    assert ids(Listing(2)) == ["b4", "b3"]
    assert ids(Listing(9, "b3")) == ["b2", "b1", "b0"]
    assert ids(Listing(2, "b1", is_ascending=True)) == ["b2", "b3"]


def test_the_files_of_a_tenant_are_limited(store: BatchStore) -> None:
    add_file(store, "one", b"12345678")
    with pytest.raises(PayloadTooLargeError, match="8 bytes, and this one 3"):
        add_file(store, "two", b"123")
    add_file(store, "three", b"123", tenant="b")
    assert json.dumps(add_file(store, "four", b"12").as_json()).count("tenant") == 0


def test_a_tenant_has_a_limited_number_of_open_batches(store: BatchStore) -> None:
    add_batch(store, make_batch("done", status="completed"), 1)
    add_batch(store, make_batch("b1"), 1)
    with pytest.raises(OverloadedError, match="1 batches that have not ended; the limit is 1"):
        add_batch(store, make_batch("b2"), 1)
    add_batch(store, make_batch("b3", tenant="b"), 1)


def test_large_results_are_read_in_parts(store: BatchStore) -> None:
    add_batch(store, make_batch(), 9)
    content = b'"%s"' % (b"x" * 400_000)
    store.record("b", [result(line, content) for line in range(1, 16)])
    tracemalloc.start()
    store.finish("b", end, 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read(store, "b-out")) == 15 * (len(content) + 1)
    assert peak < 7 * len(content)  # at most three, or a piece of the file, and copies


def test_a_file_is_read_by_lines_and_in_pieces(store: BatchStore, place: Place) -> None:
    lines = [b"%d %s\n" % (number, b"x" * 70_000) for number in range(40)]
    file = StoredFile("f", "a", "in.jsonl", "batch", sum(map(len, lines)), 1, 100)
    part = store.part("f")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"".join(lines))
    store.add_file(file, part, 10_000_000)
    assert not part.exists()
    with place.open().open("f") as opened:
        assert opened.readline(10) == lines[0][:10]
        assert opened.readline() == lines[0][10:]
        assert list(opened) == lines[1:]
    assert read(store, "f") == b"".join(lines)
    add_file(store, "empty", b"", tenant="b")
    assert read(store, "empty") == b""
    with store.open("f") as opened:
        opened.read(1)
        store.delete_file("f", "a")
    with pytest.raises(FileNotFoundError):
        store.open("f")


def test_files_without_an_entry_are_deleted_after_a_day(store: BatchStore) -> None:
    day_s = 24 * 3600
    now_s = int(time.time())
    add_file(store, "f", expires_at=now_s + 9 * day_s)
    add_batch(store, make_batch("lost"), 9)
    store.record("lost", [result(1)])
    store.change_batch("lost", lambda batch: replace(batch, status="failed"))
    folder = store.part("").parent
    for name in ("orphan", "file.part"):  # after crashes
        (folder / name).write_bytes(b"x")
    store.delete_old(now_s, 0)
    assert {path.name for path in folder.iterdir()} >= {"orphan", "file.part"}
    store.delete_old(now_s + 2 * day_s, 0)
    assert {path.name for path in folder.iterdir()} <= {"f"}
    assert has_content(store, "f")
    assert store.done_lines("lost") == set()


def test_old_files_are_deleted_unless_a_batch_needs_them(store: BatchStore) -> None:
    add_file(store, "f", expires_at=10)
    add_file(store, "g", expires_at=10)
    add_batch(store, make_batch(), 9)
    add_batch(store, make_batch("done", status="completed"), 9)
    store.delete_old(11, 5)
    assert has_content(store, "f")
    assert not has_content(store, "g")
    assert store.find_batch("done") is None
    assert store.find_batch("b") is not None


def test_the_input_of_an_open_batch_is_not_deleted(store: BatchStore, place: Place) -> None:
    add_file(store, "f", expires_at=10)
    store.add_batch(make_batch(), 9)
    with pytest.raises(InvalidRequestError, match="in use by b"):
        place.open().delete_file("f", "a")
    assert has_content(store, "f")
    store.finish("b", end, 50)
    assert place.open().delete_file("f", "a")
    assert not store.delete_file("f", "a")
    with pytest.raises(NotFoundError, match="No such file: f"):
        store.add_batch(make_batch("late"), 9)


@pytest.mark.parametrize("by", ["request", "age"])
def test_a_batch_and_the_deletion_of_its_input_exclude_each_other(place: Place, by: str) -> None:
    store, other = place.open(), place.open()
    for number in range(10):
        add_file(store, "f", expires_at=10)

        def delete() -> None:
            with suppress(InvalidRequestError):
                if by == "age":
                    other.delete_old(11, 0)
                else:
                    other.delete_file("f", "a")

        with ThreadPoolExecutor() as threads:
            deletion = threads.submit(delete)
            with suppress(NotFoundError):
                store.add_batch(make_batch(f"b{number}"), 9)
            deletion.result()
        assert bool(store.open_batches()) == has_content(store, "f")
        store.change_batch(f"b{number}", end)
        store.delete_file("f", "a")


def test_one_router_has_the_lease_until_it_drops_it_or_is_silent(store: BatchStore) -> None:
    assert store.take_lease("one", 0, 5)
    assert not store.take_lease("two", 4, 5)
    assert store.take_lease("one", 4, 5)
    assert not store.take_lease("two", 8, 5)
    assert store.take_lease("two", 10, 5)
    store.drop_lease("one")  # not its any more
    assert not store.take_lease("one", 11, 5)
    store.drop_lease("two")
    assert store.take_lease("one", 11, 5)


def test_a_lease_ends_after_a_clock_was_set_back(store: BatchStore) -> None:
    assert store.take_lease("lost", 4000, 5)
    assert not store.take_lease("two", 3970, 5)  # clocks of several nodes may differ
    assert store.take_lease("two", 400, 5)


def test_connections_that_the_server_closed_are_replaced(tmp_path: Path, postgres: str) -> None:
    place = Place(tmp_path, postgres)
    store = place.open()
    add_batch(store, make_batch(), 9)
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
    assert store.find_batch("b") is not None
    place.close()


def test_a_router_that_starts_waits_for_no_transaction_of_another(
    tmp_path: Path, postgres: str
) -> None:
    place = Place(tmp_path, postgres, "busy")
    add_batch(place.open(), make_batch(), 9)
    with psycopg.connect(postgres) as busy:  # has read and written, and is not yet committed
        busy.execute("SELECT * FROM tandem_busy.files")
        for table in ("files", "batches", "results", "lease", "contents"):
            busy.execute(f"LOCK TABLE tandem_busy.{table} IN ROW EXCLUSIVE MODE".encode())
        assert [batch.id for batch in place.open().open_batches()] == ["b"]
    place.close()


def test_applications_with_similar_names_share_nothing(tmp_path: Path, postgres: str) -> None:
    long = "x" * 60
    for name in ("a-b", "a.b", "A_b", "a_b", f"{long}1", f"{long}2"):
        place = Place(tmp_path, postgres, name)
        store = place.open()
        assert store.open_batches() == []
        add_batch(store, make_batch(), 9)
        assert [batch.id for batch in place.open().open_batches()] == ["b"]
        place.close()
    with psycopg.connect(postgres) as connection:
        rows = connection.execute("SELECT schema_name FROM information_schema.schemata")
        assert "tandem_a_b" in {name for (name,) in rows}
