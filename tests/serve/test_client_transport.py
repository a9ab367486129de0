"""Transport of the client: links to all routers, and the handle without them."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.client import repeating, wire
from cluster.client import transport as transport_module
from cluster.client.session import BackgroundLoop, Session
from cluster.client.transport import LinkOffer, Transport
from cluster.client.wire import ApiRequest
from cluster.errors import LinkClosedError
from cluster.link import LinkServer, RequestHead, answer_locally
from tests.serve.link_kit import SECRET, on_both_loops, receive_body, send_body, send_head, until


class FakeHandle:
    """A Serve handle to a router in this process."""

    def __init__(self, app: ASGIApp, addresses: list[tuple[str, int]]) -> None:
        self.addresses = addresses
        self.fails = self.hangs = False
        self.offers = 0
        self.calls = 0
        self._app = app

    def options(self, **_: Any) -> "FakeHandle":
        return self

    @property
    def link_offer(self) -> Any:
        return _Remote(self._offer)

    @property
    def call(self) -> Any:
        return _Remote(self._call)

    async def _offer(self) -> Any:
        self.offers += 1
        if self.fails:
            raise ConnectionError("no router")
        if self.hangs:
            await asyncio.Future()
        return LinkOffer(SECRET, list(self.addresses))

    def _call(self, head: RequestHead, body: bytes) -> Any:
        self.calls += 1
        return _Items(answer_locally(self._app, head, body))


class _Remote:
    def __init__(self, remote: Any) -> None:
        self.remote = remote


class _Items:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __aiter__(self) -> Any:
        return self._read()

    async def _read(self) -> AsyncIterator[Any]:
        async with aclosing(self._items):
            async for item in self._items:
                yield item

    def cancel(self) -> None:
        pass


def named(name: bytes) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await receive_body(receive)
        await send_head(send)
        await send_body(send, name + b" " + scope["path"].encode() + b"?" + scope["query_string"])
        if scope["path"] == "/hang":
            await asyncio.Future()
        await send_body(send, body, more=False)

    return app


async def ask(transport: Transport, body: bytes = b"b") -> bytes:
    head, answer = await transport.ask("POST", "/p?q=1", body)
    assert head.status == 200
    return answer


@on_both_loops
async def test_requests_take_the_least_used_link() -> None:
    servers = [LinkServer(named(name), SECRET) for name in (b"one", b"two")]
    handle = FakeHandle(named(b"handle"), [await server.start() for server in servers])
    transport = Transport(handle)  # type: ignore[arg-type]
    opened = [await transport.open("POST", "/hang", b"") for _ in range(4)]
    assert sorted([server.counts.connects for server in servers]) == [1, 1]
    answers = [await one.answer.read() for one in opened]
    assert sorted(answers) == [b"one /hang?"] * 2 + [b"two /hang?"] * 2
    for one in opened:
        one.answer.cancel()
    assert handle.offers == 1
    assert handle.calls == 0
    await transport.close()
    for server in servers:
        await server.stop()


@on_both_loops
async def test_without_a_link_requests_use_the_handle_and_links_are_not_retried() -> None:
    handle = FakeHandle(named(b"handle"), [("127.0.0.1", 1)])
    transport = Transport(handle)  # type: ignore[arg-type]
    assert await ask(transport) == b"handle /p?q=1b"
    assert await ask(transport, b"x" * 300_000) == b"handle /p?q=1" + b"x" * 300_000
    assert (handle.offers, handle.calls) == (1, 2)
    await transport.close()


@pytest.mark.parametrize("failure", ["hangs", "fails"])
async def test_calls_fail_if_no_router_answers(
    monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(transport_module, "OFFER_TIMEOUT_S", 0.01)
    monkeypatch.setattr(repeating, "PAUSES_S", (0.0, 0.0))
    handle = FakeHandle(named(b"handle"), [])
    setattr(handle, failure, True)
    transport = Transport(handle)  # type: ignore[arg-type]
    with pytest.raises(LinkClosedError, match="no link to a router"):
        await ask(transport)
    assert (handle.offers, handle.calls) == (3, 0)
    setattr(handle, failure, False)
    server = LinkServer(named(b"link"), SECRET)
    handle.addresses = [await server.start()]
    assert await ask(transport) == b"link /p?q=1b"
    await transport.close()
    await server.stop()


async def test_a_call_starts_over_if_its_router_is_lost() -> None:
    began = asyncio.Event()

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        await send_body(send, b"half")
        began.set()
        await asyncio.Future()

    one, two = LinkServer(half, SECRET), LinkServer(named(b"two"), SECRET)
    handle = FakeHandle(named(b"handle"), [await one.start()])
    transport = Transport(handle)  # type: ignore[arg-type]
    asking = asyncio.create_task(ask(transport))
    await began.wait()
    handle.addresses = [await two.start()]
    for connection in tuple(one.connections):
        connection.fail(LinkClosedError("killed"))
    assert await asking == b"two /p?q=1b"
    assert handle.calls == 0
    await transport.close()
    await one.stop()
    await two.stop()


@on_both_loops
async def test_links_follow_the_running_routers() -> None:
    old, new = LinkServer(named(b"old"), SECRET), LinkServer(named(b"new"), SECRET)
    handle = FakeHandle(named(b"handle"), [await old.start()])
    transport = Transport(handle)  # type: ignore[arg-type]
    assert await ask(transport) == b"old /p?q=1b"
    await old.stop()
    handle.addresses = [await new.start()]
    await until(lambda: not transport.links.num_connected)
    assert await ask(transport) == b"new /p?q=1b"
    assert handle.calls == 0
    await transport.close()
    await new.stop()


@on_both_loops
async def test_cancelling_a_request_cancels_its_work() -> None:
    cancelled = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send_head(send)
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    server = LinkServer(slow, SECRET)
    transport = Transport(FakeHandle(slow, [await server.start()]))  # type: ignore[arg-type]
    asking = asyncio.create_task(transport.ask("POST", "/", b""))
    await until(lambda: server.num_streams == 1)
    asking.cancel()
    await cancelled.wait()
    await asyncio.wait([asking])
    await transport.close()
    await server.stop()


def test_a_session_drops_the_transports_of_closed_event_loops() -> None:
    session = Session("app", "auto")
    handle = FakeHandle(named(b"handle"), [("127.0.0.1", 1)])
    session.__dict__["_router"] = handle  # the cached property

    async def once() -> list[str]:
        request = ApiRequest("/p", {}, lambda answer: [answer])
        with pytest.raises(json.JSONDecodeError):  # the application answers in plain text
            await session.run([request])
        return list(map(str, session.transports))

    assert [len(asyncio.run(once())) for _ in range(3)] == [1, 1, 1]
    assert handle.calls == 3


async def test_an_error_of_a_local_application_is_raised() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LinkClosedError("broken")

    with pytest.raises(LinkClosedError, match="broken"):
        async for _ in answer_locally(broken, RequestHead(), b""):
            pass


def test_the_background_loop_returns_results_and_raises_errors() -> None:
    background = BackgroundLoop()

    async def value() -> int:
        return 7

    async def error() -> None:
        raise ValueError("wrong")

    assert background.run(value()) == 7
    with pytest.raises(ValueError, match="wrong"):
        background.run(error())
    background.close()
    assert not background.loop.is_running()
    background.close()


async def test_a_failure_after_the_reader_left_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        raise RuntimeError("planted")

    items = answer_locally(broken, RequestHead(), b"")
    await anext(items)
    await asyncio.sleep(0)
    await items.aclose()
    del items
    gc.collect()
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text


async def silent_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Send the first event of a stream, or nothing, and then hang."""
    if scope["path"] == wire.CHAT:
        await send_head(send, 200)
        await send_body(send, b'data: {"choices": []}\n\n')
    await asyncio.Future()


async def test_calls_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_router", FakeHandle(silent_app, []))
    session = Session("app", "auto", timeout_s=0.5)
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        await session.run([ApiRequest("/classify", {}, lambda answer: [answer])])
    pieces = session.delta_batches(b"{}")
    assert await anext(pieces) == []
    with pytest.raises(TimeoutError, match="timeout_s"):
        await anext(pieces)
    await session.aclose()
