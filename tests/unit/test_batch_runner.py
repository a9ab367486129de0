"""The run of one batch against answers that fail: none blocks it, and none is paid for twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.admission import OPEN, Identity
from cluster.batches import (
    Batch,
    BatchStore,
    LineResult,
    StoredFile,
    StoreError,
    open_store,
)
from cluster.config import RouterConfig
from cluster.errors import ReplicaLostError, RequestError, UnavailableError
from cluster.gateway.batches.answers import MAX_LOST_ATTEMPTS
from cluster.gateway.batches.runner import BatchRun, RunnerTools
from cluster.gateway.batches.threads import BatchThreads
from cluster.gateway.messages import Request, Response, bytes_response

Answer = Callable[[Request], Response]


def good(_: Request) -> Response:
    return bytes_response(200, b"application/json", b"{}")


def number_of(request: Request) -> int:
    return int(json.loads(request.body)["number"])


class Runner:
    """A batch of three lines whose answers are scripted."""

    def __init__(self, directory: Path) -> None:
        self.store = open_store(directory)
        self.threads = BatchThreads()
        self.answer: Answer = good
        self.find_identity: Callable[[str, str], Identity] = lambda *_: OPEN
        self.asked: list[int] = []
        self.is_late = False
        ids = {"id": "b", "input_file_id": "in", "output_id": "out", "error_id": "err"}
        times = {"created_at": 0, "expires_at": 100, "completion_window": "1h"}
        self.batch = Batch(tenant="a", endpoint="/classify", **ids, **times)  # type: ignore[arg-type]
        lines = [
            {"custom_id": f"c{number}", "method": "POST", "url": "/classify", "body": body}
            for number in range(3)
            for body in [{"number": number}]
        ]
        part = self.store.part("in")
        part.parent.mkdir(parents=True)
        part.write_text("\n".join(map(json.dumps, lines)))
        file = StoredFile("in", "a", "in.jsonl", "batch", 1, 0, 100)
        self.store.add_file(file, part, 10)
        self.store.add_batch(self.batch, 9)

    async def _relay(self, request: Request) -> Response:
        self.asked.append(number_of(request))
        return self.answer(request)

    async def run(self) -> Batch:
        tools = RunnerTools(
            store=self.store,
            threads=self.threads,
            relay=self._relay,
            find_spare=lambda *_: None,
            find_identity=lambda *names: self.find_identity(*names),
            list_models=lambda _: [],
            clock=lambda: 1.0,
            count_line=lambda _: None,
        )
        run = BatchRun(self.batch, tools, RouterConfig())
        if self.is_late:
            run.stop()
        await run.run()
        batch = self.store.find_batch("b")
        assert batch is not None
        return batch

    def errors(self) -> list[Any]:
        with self.store.open("err") as file:
            return [json.loads(line) for line in file]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    for name in ("MAX_PAUSE_S", "RETRY_S"):
        monkeypatch.setattr(f"cluster.gateway.batches.runner.{name}", 0.0)
    return Runner(tmp_path)


@pytest.mark.parametrize(
    ("error", "attempts", "status"),
    [
        (KeyError("a defect"), 4, 500),
        (ReplicaLostError("lost", retry_after_s=1), MAX_LOST_ATTEMPTS, 503),
        (UnavailableError("too long for guards"), MAX_LOST_ATTEMPTS, 503),
    ],
)
async def test_a_line_that_always_fails_does_not_hold_up_the_others(
    runner: Runner, error: Exception, attempts: int, status: int
) -> None:
    def answer(request: Request) -> Response:
        if number_of(request) == 1:
            raise error
        return good(request)

    runner.answer = answer
    batch = await runner.run()
    assert (batch.status, batch.completed, batch.failed) == ("completed", 2, 1)
    assert runner.asked.count(1) == attempts
    assert len(runner.asked) == attempts + 2
    (line,) = runner.errors()
    assert line["response"]["status_code"] == status


async def test_refusals_for_load_do_not_count(runner: Runner) -> None:
    refusals = 3 * [UnavailableError("busy", retry_after_s=1)] * MAX_LOST_ATTEMPTS

    def answer(request: Request) -> Response:
        if refusals:
            raise refusals.pop()
        return good(request)

    runner.answer = answer
    assert (await runner.run()).completed == 3


async def test_results_wait_for_a_full_disk_instead_of_being_computed_again(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 3
    record = BatchStore.record

    def fail_first(store: BatchStore, id_: str, results: list[LineResult]) -> Batch | None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreError("database or disk is full")
        return record(store, id_, results)

    monkeypatch.setattr(BatchStore, "record", fail_first)
    assert (await runner.run()).completed == 3
    assert sorted(runner.asked) == [0, 1, 2]


async def test_an_expired_batch_stays_so_after_a_crash_at_its_end(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.is_late = True
    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await runner.run()
    (runner.batch,) = runner.store.open_batches()
    assert runner.batch.failed == 3
    batch = await runner.run()
    assert (batch.status, batch.failed) == ("expired", 3)


@pytest.mark.parametrize(("failures", "completed"), [(5, 3), (None, 0)])
async def test_lines_wait_for_unknown_keys_and_fail_without_theirs(
    runner: Runner, failures: int | None, completed: int
) -> None:
    errors: list[RequestError] = [UnavailableError("unknown", retry_after_s=1)] * (failures or 0)

    def find(*_: str) -> Identity:
        if errors:
            raise errors.pop()
        if failures is None:
            raise RequestError("revoked")
        return OPEN

    runner.find_identity = find
    batch = await runner.run()
    assert (batch.status, batch.completed) == ("completed", completed)
    assert len(runner.asked) == completed
