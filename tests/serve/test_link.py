"""The link over loopback while both ends are healthy."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.asgi import IS_CANCELLED, USAGE, Message, Receive, Scope, Send, usage_of
from cluster.errors import (
    HeadersTooLargeError,
    InternalError,
    InvalidRequestError,
    LinkClosedError,
    UnavailableError,
)
from cluster.link import (
    LinkOptions,
    RequestHead,
)
from cluster.link.frames import HEADER_BYTES
from cluster.link.server import ServerConnection
from cluster.usage import Usage, UsageCounter
from tests.serve.link_kit import (
    ask,
    echo,
    linked,
    on_both_loops,
    read_all,
    receive_body,
    send_body,
    send_head,
    until,
)

MIB = 1024 * 1024


@on_both_loops
async def test_the_application_sees_the_request_as_an_asgi_scope() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await echo(scope, receive, send)

    head = RequestHead(
        method="POST",
        path="/v1/ä",
        query_string=b"a=1",
        headers=[(b"host", b"tandem")],
        request_id="r-1",
        client=("10.0.0.9", 555),
    )
    async with linked(app) as (server, client):
        stream = client.open(head, b"body")
        response = await stream.head()
        assert (response.status, response.headers) == (200, [(b"content-type", b"text/plain")])
        assert await read_all(stream) == b"body"
        assert await stream.read() == b""
        assert stream.ended
        assert client.num_open == server.num_streams == 0
    scope = dict(seen[0])
    assert scope.pop("server") == server.address
    assert scope["extensions"].pop(IS_CANCELLED)() is False
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/ä",
        "raw_path": b"/v1/%C3%A4",
        "query_string": b"a=1",
        "root_path": "",
        "headers": [(b"host", b"tandem"), (b"x-request-id", b"r-1")],
        "client": ("10.0.0.9", 555),
        "state": {},
        "extensions": {USAGE: UsageCounter()},
    }


@on_both_loops
async def test_interleaved_streams_keep_their_order_and_content() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive_body(receive)
        seed = random.Random(scope["path"])
        await send_head(send)
        for number in range(60):
            await send_body(send, b"%s:%d;" % (scope["path"].encode(), number))
            for _ in range(seed.randrange(3)):
                await asyncio.sleep(0)
        await send_body(send, b"", more=False)

    async with linked(app) as (_, client):
        answers = await asyncio.gather(*(ask(client, f"/{n}", b"x" * n) for n in range(200)))
    for n, (_, answer) in enumerate(answers):
        assert answer == b"".join(b"/%d:%d;" % (n, number) for number in range(60))


@on_both_loops
async def test_ten_thousand_streams_arrive_complete_and_in_order() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await receive_body(receive)
        await send_head(send)
        for number in range(3):
            await send_body(send, b"%s.%d " % (body, number))
            await asyncio.sleep(0)
        await send_body(send, b"", more=False)

    async with linked(app) as (server, client):
        answers = await asyncio.gather(*(ask(client, "/", b"%d" % n) for n in range(10_000)))
        assert answers == [(200, b"%d.0 %d.1 %d.2 " % (n, n, n)) for n in range(10_000)]
        assert client.num_open == 0
        await until(lambda: server.num_streams == 0)


class CountingTransport:
    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.sizes: list[int] = []

    def write(self, data: bytes) -> None:
        self.sizes.append(len(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@on_both_loops
async def test_frames_of_one_event_loop_pass_are_sent_in_one_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transports: list[CountingTransport] = []
    connection_made = ServerConnection.connection_made

    def count_writes(self: ServerConnection, transport: Any) -> None:
        transports.append(CountingTransport(transport))
        connection_made(self, transports[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(ServerConnection, "connection_made", count_writes)
    step = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        await step.wait()
        await send_body(send, b"x" * 100)
        await asyncio.Future()

    async with linked(app) as (_, client):
        streams = [client.open(RequestHead()) for _ in range(64)]
        await asyncio.gather(*(stream.head() for stream in streams))
        (transport,) = transports
        transport.sizes.clear()
        step.set()
        assert {await stream.read() for stream in streams} == {b"x" * 100}
        assert max(transport.sizes) == 64 * (HEADER_BYTES + 100)
        assert len(transport.sizes) <= 2  # a LOAD frame may be sent alone


@on_both_loops
async def test_a_late_reader_gets_everything_in_one_read() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        for _ in range(100):
            await send_body(send, b"ab")
            await asyncio.sleep(0)
        await send_body(send, b"", more=False)

    async with linked(app) as (_, client):
        stream = client.open(RequestHead())
        await until(lambda: stream.ended)
        assert await stream.read() == b"ab" * 100
        assert await stream.read() == b""


@on_both_loops
async def test_an_idle_reader_blocks_only_its_own_stream() -> None:
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send_head(send)
        if scope["path"] == "/big":
            for _ in range(10 * MIB // 8192):
                await send_body(send, b"x" * 8192)
                sent += 8192
        await send_body(send, b"done", more=False)

    options = LinkOptions(window_bytes=128 * 1024)
    async with linked(app, options=options) as (server, client):
        slow = client.open(RequestHead(path="/big"))
        for _ in range(200):
            assert await ask(client, "/small") == (200, b"done")
        assert sent == 128 * 1024
        (connection,) = server.connections
        assert connection.unsent_bytes < 1024
        assert len(await read_all(slow)) == 10 * MIB + 4


@on_both_loops
async def test_a_sink_gets_pieces_in_order_with_those_that_it_refuses() -> None:
    pieces = [b"%d;" % number * 1000 for number in range(2000)]  # many windows
    goes_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        for piece in pieces:
            await goes_on.wait()
            await send_body(send, piece)
            await asyncio.sleep(0)
        await send_body(send, b"end", more=False)

    got, passed = [], 0

    def sink(piece: bytes) -> bool:
        nonlocal passed
        passed += 1
        if passed % 3 == 0:
            return False
        got.append(piece)
        return True

    async with linked(app, options=LinkOptions(window_bytes=64 * 1024)) as (_, client):
        stream = client.open(RequestHead())
        stream.sink = sink
        await stream.head()
        goes_on.set()
        while piece := await stream.read():
            await asyncio.sleep(0)  # what arrives meanwhile must not overtake the piece
            got.append(piece)
        assert stream.sink is None
    assert b"".join(got) == b"".join(pieces) + b"end"
    assert passed > 1  # pieces of one pass of the loop are one


@on_both_loops
async def test_a_failing_sink_fails_only_its_stream() -> None:
    cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        await send_body(send, b"first")
        await receive()
        try:
            while scope["path"] == "/fails":
                await send_body(send, b"more")
                await asyncio.sleep(0)
            await send_body(send, b" last", more=False)
        finally:
            cancelled.set()

    def sink(piece: bytes) -> bool:
        raise ValueError("a defect")

    async with linked(app) as (_, client):
        stream = client.open(RequestHead(path="/fails"))
        assert (await stream.read()).startswith(b"first")
        stream.sink = sink
        with pytest.raises(ValueError, match="a defect"):
            await read_all(stream)
        await cancelled.wait()
        assert await ask(client, "/other") == (200, b"first last")


@on_both_loops
async def test_an_unread_request_body_stops_at_the_window() -> None:
    sent = 0
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            yield b"x" * 65536
            sent += 65536

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/late":
            await go_on.wait()
        await send_head(send)
        await send_body(send, b"%d" % len(await receive_body(receive)), more=False)

    async with linked(app) as (_, client):
        late = asyncio.create_task(ask(client, "/late", body()))
        await until(lambda: sent >= 4 * 65536)
        for _ in range(50):
            await ask(client, "/")
        assert sent == 4 * 65536
        go_on.set()
        assert await late == (200, b"%d" % (64 * 65536))


@on_both_loops
async def test_small_streams_overtake_a_body_of_10_mb() -> None:
    order: list[str] = []

    async def one(client: Any, name: str, body: bytes) -> None:
        assert await ask(client, "/", body) == (200, body)
        order.append(name)

    async with linked(echo) as (_, client):
        big = random.Random(1).randbytes(10 * MIB)
        async with asyncio.TaskGroup() as group:
            group.create_task(one(client, "big", big))
            for _ in range(20):
                group.create_task(one(client, "small", b"hello"))
    assert order[-1] == "big"


@on_both_loops
async def test_cancelling_a_stream_cancels_the_application_and_disconnects_it() -> None:
    messages: list[Message] = []
    cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send_head(send)
        listener = asyncio.ensure_future(receive())
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            messages.append(await listener)
            with pytest.raises(OSError, match="gone"):
                await send_body(send, b"too late")
            cancelled.set()
            raise

    async with linked(app) as (server, client):
        async with client.open(RequestHead()) as stream:
            await stream.head()
        await cancelled.wait()
        await until(lambda: server.num_streams == 0)
        with pytest.raises(LinkClosedError):
            await stream.read()
        assert messages == [{"type": "http.disconnect"}]
        assert await ask_once_more(client) == client.num_open == 0


async def ask_once_more(client: Any) -> int:
    stream = client.open(RequestHead())
    await stream.head()
    stream.cancel()
    stream.cancel()
    return int(client.num_open)


@on_both_loops
async def test_a_stream_can_be_cancelled_before_the_application_starts() -> None:
    async with linked(echo) as (server, client):
        for _ in range(50):
            client.open(RequestHead(), b"x").cancel()
        assert await ask(client, "/", b"y") == (200, b"y")
        assert server.num_streams == 0


@on_both_loops
async def test_an_early_response_stops_the_upload() -> None:
    closed = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
        finally:
            closed.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send, 413)
        await send_body(send, b"too large", more=False)

    async with linked(app) as (_, client):
        assert await ask(client, "/", body()) == (413, b"too large")
        await closed.wait()


@on_both_loops
async def test_a_failing_upload_fails_its_stream_and_cancels_the_application() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await began.wait()
        raise ZeroDivisionError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        try:
            await receive_body(receive)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with linked(app) as (_, client):
        with pytest.raises(ZeroDivisionError):
            await ask(client, "/", body())
        await cancelled.wait()


@on_both_loops
async def test_application_errors_reach_the_reader_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/typed":
            raise InvalidRequestError("too long")
        if scope["path"] == "/late":
            await send_head(send)
            await send_body(send, b"some")
        if scope["path"] == "/cancel":
            raise asyncio.CancelledError
        if scope["path"] != "/silent":
            raise KeyError("private")

    async with linked(app) as (_, client):
        for path in ("/", "/silent"):
            with pytest.raises(InternalError) as caught:
                await client.open(RequestHead(path=path)).head()
            assert "private" not in caught.value.message
        with pytest.raises(InvalidRequestError, match="too long"):
            await client.open(RequestHead(path="/typed")).head()
        with pytest.raises(UnavailableError):
            await client.open(RequestHead(path="/cancel")).head()
        stream = client.open(RequestHead(path="/late"))
        assert (await stream.head()).status == 200
        await until(lambda: stream.ended)
        assert await stream.read() == b"some"  # what arrived before the failure is not lost
        for _ in range(2):
            with pytest.raises(InternalError):
                await stream.read()
    assert caplog.text.count("KeyError: 'private'") == 2


@on_both_loops
async def test_misuse_of_send_raises_in_the_application() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(RuntimeError, match="before"):
            await send_body(send, b"")
        await send_head(send)
        with pytest.raises(RuntimeError, match="unexpected"):
            await send_head(send)
        await send_body(send, b"ok", more=False)
        with pytest.raises(RuntimeError, match="after the end"):
            await send_body(send, b"")
        assert await receive() == {"type": "http.disconnect"}

    async with linked(app) as (_, client):
        assert await ask(client) == (200, b"ok")


@on_both_loops
async def test_usage_is_known_at_the_end_of_a_stream() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        usage = usage_of(scope)
        usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = 100, 32, 7
        await send_head(send)
        await send_body(send, b"x" * (200_000 if scope["path"] == "/large" else 2), more=False)

    async with linked(app) as (_, client):
        for path in ("/small", "/large"):
            stream = client.open(RequestHead(path=path))
            await stream.head()
            await read_all(stream)
            assert stream.usage == Usage(100, 32, 7)
    async with linked(echo) as (_, client):
        stream = client.open(RequestHead())
        await read_all(stream)
        assert stream.usage is None


@on_both_loops
async def test_large_and_mutable_messages_arrive_intact() -> None:
    data = random.Random(2).randbytes(3 * MIB)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        buffer = bytearray(b"first")
        await send({"type": "http.response.body", "body": buffer, "more_body": True})
        buffer[:] = b"FIRST"
        await send({"type": "http.response.body", "body": memoryview(data), "more_body": True})
        await send_body(send, data, more=False)

    async with linked(app) as (_, client):
        assert await ask(client) == (200, b"first" + data + data)


@on_both_loops
async def test_heads_that_fit_no_frame_fail_alone() -> None:
    large = [(b"x-large", b"x" * MIB)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": large})
        if scope["path"] == "/error":
            raise InvalidRequestError("x" * MIB)
        if scope["path"] == "/wait":
            await asyncio.sleep(60)
        await echo(scope, receive, send)

    async with linked(app) as (_, client):
        other = client.open(RequestHead(path="/wait"))
        with pytest.raises(HeadersTooLargeError, match="1048576"):
            client.open(RequestHead(headers=large))
        with pytest.raises(InternalError, match="headers of the response"):
            await client.open(RequestHead(path="/large")).head()
        with pytest.raises(InvalidRequestError):
            await client.open(RequestHead(path="/error")).head()
        assert client.num_open == 1
        assert other.error is None
        other.cancel()


@on_both_loops
async def test_request_that_cannot_be_encoded_leaves_no_stream() -> None:
    async with linked(echo) as (_, client):
        with pytest.raises(UnicodeEncodeError):
            client.open(RequestHead(path="/\ud800"))
        assert client.num_open == 0


@on_both_loops
async def test_cancelled_stream_reports_its_usage() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        for _ in range(3):
            usage_of(scope).completion_tokens += 1
            await send_body(send, b"a")
        await asyncio.Future()

    async with linked(app) as (_, client):
        stream = client.open(RequestHead())
        finished = asyncio.Event()
        stream.on_finished = finished.set
        assert await stream.read()
        stream.cancel()
        assert client.num_open == 0
        await asyncio.wait_for(finished.wait(), 30)
        assert stream.usage == Usage(0, 0, 3)


async def test_usage_of_a_cancelled_stream_is_awaited_while_the_engine_is_busy() -> None:
    delays_s = iter((0.0, 2.5))  # the second is longer than the wait before the first report

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        usage_of(scope).completion_tokens = 3
        await send_body(send, b"a")
        try:
            await asyncio.Future()
        finally:
            await asyncio.sleep(next(delays_s))

    async with linked(app) as (_, client):
        for _ in range(2):
            stream = client.open(RequestHead())
            finished = asyncio.Event()
            stream.on_finished = finished.set
            assert await stream.read()
            stream.cancel()
            await asyncio.wait_for(finished.wait(), 30)
            assert stream.usage == Usage(0, 0, 3)
