"""The run of one batch: validation, its lines, and its files."""

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal

import msgspec

from cluster.admission import MIN_PRIORITY, Identity
from cluster.batches import (
    Batch,
    BatchStore,
    LineError,
    LineReader,
    LineResult,
    StoreError,
    check_lines,
    error_line,
    model_of,
    parse_line,
    result_line,
)
from cluster.batches.types import Status
from cluster.config import RouterConfig
from cluster.errors import RequestError
from cluster.gateway.batches.answers import LineAnswer, Relay, ask, error_answer
from cluster.gateway.batches.spare import LineSlot, SpareCapacity
from cluster.gateway.batches.threads import BatchThreads
from cluster.gateway.messages import Request

logger = logging.getLogger("ray.serve.tandem")

RETRY_S = 5.0
"""Pause after a failure of the database, in seconds."""
MAX_PAUSE_S = 30.0
"""Longest pause before a line that was refused is sent again, in seconds."""
_FINISH_LINES = 200
"""Lines without an answer whose errors are stored at once."""

_NO_INPUT = LineError("file_not_found", "The input file no longer exists.")

replace = msgspec.structs.replace
EndReason = Literal["expired", "cancelled"]
_REASONS: Mapping[EndReason, tuple[str, str]] = {
    "expired": ("batch_expired", "The batch's completion window ended before this request ran."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request ran."),
}


@dataclass(slots=True)
class _Line:
    number: int
    content: bytes
    num_attempts: int = 0
    num_failures: int = 0


@dataclass(frozen=True, slots=True)
class RunnerTools:
    """Access of a run to its router."""

    store: BatchStore
    threads: BatchThreads
    relay: Relay
    find_spare: Callable[[str, str | None], SpareCapacity | None]
    """Returns the slots of the pool that serves a path and model; None without one."""
    find_identity: Callable[[str, str], Identity]
    """``Authenticator.find_identity``."""
    list_models: Callable[[tuple[str, ...] | None], list[str]]
    """Returns the models that exist, of those that a key allows."""
    clock: Callable[[], float]
    count_line: Callable[[bool], None]
    """Counts a line by its success."""


class BatchRun:
    """One batch that this router runs.

    Args:
        batch: The batch.
        tools: Access to the router.
        config: Section of the router when the run starts.
    """

    def __init__(self, batch: Batch, tools: RunnerTools, config: RouterConfig) -> None:
        self._batch = batch
        self._tools = tools
        self._config = config
        self._store = tools.store
        self._threads = tools.threads
        self._stop = asyncio.Event()
        self._results: list[tuple[LineResult, asyncio.Future[None]]] = []
        self._has_results = asyncio.Event()

    def stop(self) -> None:
        """Stop the lines, since the batch was cancelled or has expired, and finish it."""
        self._stop.set()

    async def run(self) -> None:
        """Run the batch from its stored state to its end.

        Raises:
            StoreError, OSError: The database or the disk failed; the state is that of the last
                transaction.
        """
        if self._batch.status == "validating":
            await self._validate()
        try:
            if self._batch.status == "in_progress":
                await self._run_lines()
            if not self._batch.is_final:
                await self._finish()
        except FileNotFoundError:
            await self._change(lambda now: self._fail(now, [_NO_INPUT]))

    def _fail(self, batch: Batch, errors: list[LineError]) -> Batch:
        return replace(batch, status="failed", failed_at=self._now(), errors=tuple(errors))

    async def _change(self, change: Callable[[Batch], Batch]) -> None:
        changed = await self._threads.run(self._store.change_batch, self._batch.id, change)
        if changed is not None:
            self._batch = changed

    def _open_input(self) -> IO[bytes]:
        return self._store.open(self._batch.input_file_id)

    def _now(self) -> int:
        return int(self._tools.clock())

    # -- validation --

    async def _validate(self) -> None:
        batch = self._batch
        try:
            num, errors = await self._threads.run_long(
                check_lines,
                self._open_input,
                batch.endpoint,
                frozenset(self._tools.list_models(batch.models)),
                self._config.batches.max_lines,
                int(self._config.max_body_bytes),
            )
        except FileNotFoundError:
            num, errors = 0, [_NO_INPUT]

        def change(now: Batch) -> Batch:
            if errors:
                return self._fail(now, errors)
            if now.status != "validating":  # cancelled meanwhile
                return replace(now, total=num)
            return replace(now, status="in_progress", in_progress_at=self._now(), total=num)

        await self._change(change)

    # -- lines --

    async def _run_lines(self) -> None:
        done = await self._threads.run(self._store.done_lines, self._batch.id)
        reader = LineReader(self._open_input, done, int(self._config.max_body_bytes))
        source = _LineSource(reader, self._threads)
        workers = [
            asyncio.create_task(self._work(source))
            for _ in range(self._config.batches.max_concurrent)
        ]
        writer = asyncio.create_task(self._write_results())
        stopped = asyncio.create_task(self._stop.wait())
        lines = asyncio.gather(*workers)
        try:
            ends: list[asyncio.Future[Any]] = [lines, stopped, writer]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            if lines.done():
                lines.result()
        finally:
            tasks = [*workers, writer, stopped]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, lines, return_exceptions=True)

    async def _work(self, source: "_LineSource") -> None:
        while True:
            line = await source.next()
            if line is None:
                return
            await self._run_line(line)

    async def _run_line(self, line: _Line) -> None:
        """Send a line until it has a result, and store that."""
        parsed = parse_line(line.content)
        id_ = f"{self._batch.id}-{line.number}"
        while True:
            spare = self._tools.find_spare(parsed.url, model_of(parsed))
            slot = None if spare is None else await spare.take(self._is_urgent)
            answer = None
            try:
                answer = await self._send(line, id_, parsed.body, slot)
            finally:
                if spare is not None and slot is not None:
                    spare.release(slot, is_finished=answer is not None and answer.status < 400)
            if answer is None:
                continue
            if answer.is_refusal:
                await asyncio.sleep(min(MAX_PAUSE_S, max(1.0, answer.retry_after_s)))
                continue
            line.num_failures += 1
            if line.num_failures >= answer.max_attempts:
                break
            await asyncio.sleep(min(MAX_PAUSE_S, 2.0 ** (line.num_failures - 1)))
        content = result_line(parsed.custom_id, answer.status, id_, answer.body)
        result = LineResult(line.number, answer.status == 200, content, answer.usage)
        await self._store_result(result)

    def _is_urgent(self) -> bool:
        """Return True in the last half of the window, in which the batch must make progress."""
        batch = self._batch
        return 2 * self._tools.clock() > batch.created_at + batch.expires_at

    async def _send(
        self, line: _Line, id_: str, body: bytes, slot: LineSlot | None
    ) -> LineAnswer | None:
        """Return the answer; None if the line was stopped for other requests."""
        if slot is not None and slot.is_stopped:  # since it was granted
            return None
        line.num_attempts += 1
        task = asyncio.create_task(self._ask(line, id_, bytes(body), slot))
        if slot is not None:
            slot.task = task
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            is_stopped = slot is not None and slot.is_stopped
            if is_stopped and current is not None and not current.cancelling():
                return None
            raise

    async def _ask(self, line: _Line, id_: str, body: bytes, slot: LineSlot | None) -> LineAnswer:
        try:
            identity = self._tools.find_identity(self._batch.tenant, self._batch.key)
        except RequestError as error:
            return error_answer(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            # After a crash, the first attempt joins the answer that may still run.
            (b"idempotency-key", f"{id_}-{line.num_attempts}".encode()),
        ]
        identity = dataclasses.replace(identity, priority=MIN_PRIORITY)
        request = Request(id_, "POST", self._batch.endpoint, b"", headers, body, identity)
        request.on_slot = None if slot is None else slot.place
        # Otherwise this router stops, and another one continues with the same answer.
        request.is_cancelled = lambda: self._stop.is_set() or bool(slot and slot.is_stopped)
        return await ask(self._tools.relay, request)

    # -- results --

    async def _store_result(self, result: LineResult) -> None:
        """Store a result, together with those that arrive while others are written."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._results.append((result, stored))
        self._has_results.set()
        await stored

    async def _write_results(self) -> None:
        while True:
            await self._has_results.wait()
            self._has_results.clear()
            written, self._results = self._results, []
            results = [result for result, _ in written]
            await self._record(results)
            for result, stored in written:
                self._tools.count_line(result.is_success)
                if not stored.done():
                    stored.set_result(None)

    async def _record(self, results: list[LineResult]) -> None:
        """Store results; wait while that fails, as the lines are charged already."""
        is_failing = False
        while True:
            try:
                await self._threads.run(self._store.record, self._batch.id, results)
                return
            except (StoreError, OSError):
                if not is_failing:
                    logger.exception("%s: cannot store results; retrying", self._batch.id)
                is_failing = True
            await asyncio.sleep(RETRY_S)

    # -- end --

    async def _finish(self) -> None:
        await self._change(self._begin_end)
        batch = self._batch
        if batch.is_final:
            return
        reason: EndReason = "cancelled" if batch.status == "cancelling" else "expired"
        num = await self._threads.run_long(self._record_unanswered, reason)
        now = self._now()

        def end(last: Batch) -> Batch:
            if last.status == "cancelling":
                return replace(last, status="cancelled", cancelled_at=now, expired_at=None)
            if last.expired_at is not None:
                return replace(last, status="expired")
            return replace(last, status="completed", completed_at=now)

        kept_until = now + self._config.batches.keep_days * 24 * 3600
        await self._threads.run_long(self._store.finish, batch.id, end, kept_until)
        logger.info("batch %s ended: %d lines, %d without an answer", batch.id, batch.total, num)

    def _begin_end(self, batch: Batch) -> Batch:
        is_cancelled, now = batch.status == "cancelling", self._now()
        expired_at = batch.expired_at
        # Stored before the errors of unanswered lines, after which a crash leaves no such line.
        if not is_cancelled and batch.completed + batch.failed < batch.total:
            expired_at = expired_at or now
        status: Status = "cancelling" if is_cancelled else "finalizing"
        finalizing_at = batch.finalizing_at or now
        return replace(batch, status=status, finalizing_at=finalizing_at, expired_at=expired_at)

    def _record_unanswered(self, reason: EndReason) -> int:
        """Store an error for each line without a result; return their number."""
        batch, store = self._batch, self._store
        if not batch.total:  # cancelled before it was validated
            return 0
        done = store.done_lines(batch.id)
        reader = LineReader(self._open_input, done, int(self._config.max_body_bytes))
        num, errors = 0, list[LineResult]()
        while lines := reader.read():
            for number, content in lines:
                custom_id = parse_line(content).custom_id
                error = error_line(custom_id, f"{batch.id}-{number}", *_REASONS[reason])
                errors.append(LineResult(number, is_success=False, content=error))
            num += len(lines)
            if len(errors) >= _FINISH_LINES:
                store.record(batch.id, errors)
                errors = []
        store.record(batch.id, errors)
        return num


class _LineSource:
    """Lines that no worker has taken."""

    def __init__(self, reader: LineReader, threads: BatchThreads) -> None:
        self._reader = reader
        self._threads = threads
        self._lines: deque[_Line] = deque()
        self._lock = asyncio.Lock()

    async def next(self) -> _Line | None:
        """Return the next line; None at the end."""
        async with self._lock:
            if not self._lines:
                found = await self._threads.run(self._reader.read)
                self._lines.extend(_Line(*pair) for pair in found)
            return self._lines.popleft() if self._lines else None
