"""Answers that a replica keeps for repeated requests: joining, limits, expiry and usage."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.asgi import Journal, Message, Receive, Scope, Send, journal_of, usage_of
from cluster.config import IdempotencyConfig
from cluster.errors import UnavailableError, UnprocessableError
from cluster.link import AnswerKey, AnswerStore
from cluster.link.frames import AnswerEvents, RequestHead, decode_answers, encode_answers
from cluster.link.server_stream import request_scope
from cluster.usage import Usage, UsageCounter

KEY = AnswerKey(b"i" * 16, b"f" * 16)


class Stream:
    """Stream of a router: the body is complete, and what is sent is collected."""

    def __init__(self, earlier: bytes | None = None) -> None:
        self.is_lost = self.is_final = False
        self.journal = None if earlier is None else Journal()
        if self.journal is not None:
            self.journal.earlier = earlier or b""
        self.report_usage: Callable[[], Usage | None] = lambda: None
        self.head: Message = {}
        self.pieces: list[bytes] = []
        self.is_complete = False
        self.room: asyncio.Event | None = None
        """If set, a piece is sent once this is set."""

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.head = message
            return
        if self.room is not None:
            await self.room.wait()
        assert not self.is_complete
        self.pieces.append(message["body"])
        self.is_complete = not message["more_body"]


class Engine:
    """Application that sends one piece, with a journal entry, whenever the test says so."""

    def __init__(self, pieces: list[bytes], status: int = 200) -> None:
        self.pieces = pieces
        self.status = status
        self.error: Exception | None = None
        self.num_requests = 0
        self.was_cancelled = False
        self.bodies: list[bytes] = []
        self._permits = asyncio.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_requests += 1
        self.bodies.append((await receive())["body"])
        usage, journal = usage_of(scope), journal_of(scope)
        usage.prompt_tokens = 5
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        try:
            for piece in self.pieces:
                await self._permits.acquire()
                usage.completion_tokens += 1
                if journal is not None:
                    journal.add(b"+")
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await self._permits.acquire()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def go(self, num_steps: int = 1000) -> None:
        for _ in range(num_steps):
            self._permits.release()
        await settle()


class Replica:
    """A store with an engine; each request is a task."""

    def __init__(self, engine: Engine, **config: Any) -> None:
        self.engine = engine
        self.store = AnswerStore(IdempotencyConfig(**config))
        self.announced: set[bytes] = set()
        self.store.on_change = self._on_change

    def _on_change(self, added: Any, removed: Any) -> None:
        self.announced = (self.announced | set(added)) - set(removed)

    async def request(self, stream: Stream, key: AnswerKey = KEY) -> asyncio.Task[None]:
        head = RequestHead(method="POST", path="/", answer_key=key)
        scope = request_scope(head, UsageCounter(), ("", 0), ("", 0))
        task = asyncio.create_task(self.store.answer(self.engine, scope, stream, key))
        await settle()
        return task


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await settle()
    assert task.cancelled()


@given(
    pieces=st.lists(st.binary(max_size=20), max_size=12),
    joins=st.lists(st.integers(0, 13), max_size=4),
    large=st.booleans(),
)
@settings(deadline=None)
def test_requests_that_join_anywhere_get_the_whole_answer(
    pieces: list[bytes], joins: list[int], large: bool
) -> None:
    if large:
        pieces = [piece * 5000 for piece in pieces]

    async def check() -> None:
        replica = Replica(Engine(pieces))
        streams = [Stream(b"")]
        tasks = [await replica.request(streams[0])]
        for step in range(len(pieces) + 2):
            for number in joins:
                if number == step:
                    streams.append(Stream(b"" if number % 2 else None))
                    tasks.append(await replica.request(streams[-1]))
            await replica.engine.go(1)
        await asyncio.gather(*tasks)
        assert replica.engine.num_requests == 1
        for number, stream in enumerate(streams):
            assert stream.body == b"".join(pieces)
            assert stream.is_complete
            is_marked = (b"idempotent-replayed", b"true") in stream.head["headers"]
            assert is_marked == (number > 0)
            if stream.journal is not None:
                assert stream.journal.unsent == b"+" * len(pieces)
        shares = [stream.report_usage() for stream in streams]
        assert sum(share.prompt_tokens for share in shares if share) == 5
        assert sum(share.completion_tokens for share in shares if share) == len(pieces)
        await replica.store.close(1)

    asyncio.run(check())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_finished_answer_is_kept_for_a_time() -> None:
    replica = Replica(Engine([b"a", b"b"]), keep_s=1)
    task = await replica.request(Stream())
    await replica.engine.go()
    await task
    assert replica.announced == {KEY.id}
    late = Stream()
    await (await replica.request(late))
    assert late.body == b"ab"
    await until(lambda: not replica.announced)
    assert replica.store.used_bytes == 0
    await (await replica.request(Stream()))
    assert replica.engine.num_requests == 2
    await replica.store.close(1)


async def test_another_request_with_the_key_is_refused() -> None:
    replica = Replica(Engine([b"a"]))
    await replica.request(Stream())
    other = await replica.request(Stream(), AnswerKey(KEY.id, b"x" * 16))
    with pytest.raises(UnprocessableError, match="another request"):
        await other
    await replica.store.close(1)


async def test_a_disconnect_ends_the_answer_after_the_grace_time() -> None:
    replica = Replica(Engine([b"a", b"b"]), disconnect_grace_s=0.5)
    stream = Stream()
    task = await replica.request(stream)
    await replica.engine.go(1)
    await cancel(task)
    assert not replica.engine.was_cancelled
    assert stream.report_usage() == Usage(5, 0, 1)
    joined = Stream()
    task = await replica.request(joined)  # stops the timer
    await asyncio.sleep(0.6)
    await cancel(task)
    assert not replica.engine.was_cancelled
    await until(lambda: replica.engine.was_cancelled)
    await until(lambda: not replica.announced)
    assert replica.store.num_running == 0


async def test_a_final_cancellation_ends_the_answer_at_once() -> None:
    replica = Replica(Engine([b"a", b"b"]))
    stream = Stream()
    task = await replica.request(stream)
    await replica.engine.go(1)
    stream.is_final = True
    await cancel(task)
    assert replica.engine.was_cancelled
    assert stream.report_usage() == Usage(5, 0, 1)
    assert not replica.announced


async def test_an_answer_survives_the_loss_of_its_router() -> None:
    replica = Replica(Engine([b"a", b"b"]))
    stream = Stream()
    task = await replica.request(stream)
    await replica.engine.go(1)
    stream.is_lost = True
    await cancel(task)
    await replica.engine.go()  # it ends without a reader
    joined = Stream()
    await (await replica.request(joined))
    assert joined.body == b"ab"
    assert joined.report_usage() == Usage(5, 0, 2)  # the lost router reported nothing
    assert replica.engine.num_requests == 1
    await replica.store.close(1)


@pytest.mark.parametrize("error", [UnavailableError("no"), None])
async def test_failures_are_not_kept(error: Exception | None) -> None:
    replica = Replica(Engine([b"a"], status=200 if error else 503))
    replica.engine.error = error
    task = await replica.request(Stream())
    joined = await replica.request(Stream())
    await replica.engine.go()
    if error is None:
        await asyncio.gather(task, joined)
    else:
        for each in (task, joined):
            with pytest.raises(UnavailableError, match="no"):
                await each
    assert not replica.announced
    assert replica.store.used_bytes == 0


async def test_an_answer_beyond_the_limit_is_passed_on_and_not_kept() -> None:
    pieces = [bytes([number]) * 50_000 for number in range(10)]
    replica = Replica(Engine(pieces), max_answer_bytes=64 * 1024)
    fast, slow = Stream(), Stream()
    slow.room = asyncio.Event()
    tasks = [await replica.request(fast), await replica.request(slow)]
    await replica.engine.go()
    assert not replica.announced
    assert 300_000 <= len(fast.body) <= 350_000  # waits for the slow reader
    slow.room.set()
    await asyncio.gather(*tasks)
    assert fast.body == slow.body == b"".join(pieces)
    assert replica.store.used_bytes == 0


async def test_the_oldest_finished_answers_make_room() -> None:
    replica = Replica(Engine([b"x" * 40_000]), max_kept_bytes=100_000)
    await replica.engine.go()
    keys = [AnswerKey(bytes([number]) * 16, b"f" * 16) for number in range(4)]
    for key in keys:
        await (await replica.request(Stream(), key))
        await replica.engine.go()
        assert replica.store.used_bytes <= 100_000
    assert replica.announced == {keys[-2].id, keys[-1].id}
    await replica.store.close(1)


async def test_without_room_an_answer_is_not_kept() -> None:
    replica = Replica(Engine([b"a"]), max_kept_bytes=0)
    stream = Stream()
    task = await replica.request(stream)
    await replica.engine.go()
    await task
    assert stream.body == b"a"
    assert not replica.announced


async def test_a_draining_replica_ends_answers_without_streams() -> None:
    replica = Replica(Engine([b"a", b"b"]))
    task = await replica.request(Stream())
    await cancel(task)
    assert replica.store.num_running == 1
    replica.store.retire()
    await settle()
    assert replica.engine.was_cancelled
    assert replica.store.num_running == 0


async def test_a_continued_answer_adds_only_new_entries_to_a_journal() -> None:
    replica = Replica(Engine([b"a", b"b", b"c"]))
    await replica.request(Stream(b"12"))  # continues another replica's answer
    await replica.engine.go(1)
    other = Stream(b"")  # a router that has nothing yet
    task = await replica.request(other)
    await replica.engine.go()
    await task
    assert other.journal is not None
    assert other.journal.unsent == b"12+++"
    await replica.store.close(1)


@given(st.lists(st.binary(min_size=16, max_size=16)), st.lists(st.binary(min_size=16, max_size=16)))
def test_answer_frames_are_decoded_as_encoded(added: list[bytes], removed: list[bytes]) -> None:
    assert decode_answers(encode_answers(added, removed)) == AnswerEvents(added, removed)
