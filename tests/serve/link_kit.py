"""Helpers of the link tests: applications, a linked client and server, and raw peers."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest
import uvloop

from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.link import (
    ClientStream,
    LinkClient,
    LinkOptions,
    LinkServer,
    RequestHead,
)
from cluster.link.frames import MAX_PAYLOAD_BYTES, Frame, FrameDecoder
from cluster.link.handshake import Handshake
from cluster.load import Load

SECRET = b"the cluster's secret"


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """Run a test on asyncio's loop and on uvloop; fail if it leaves tasks or unhandled errors."""

    async def guarded(kwargs: dict[str, Any]) -> None:
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: problems.append(context)
        )
        async with asyncio.timeout(60):
            await test(**kwargs)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert problems == []

    @functools.wraps(test)
    def run_it(run: Callable[[Coroutine[Any, Any, None]], None], **kwargs: Any) -> None:
        run(guarded(kwargs))

    parameters = [
        inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *inspect.signature(test).parameters.values(),
    ]
    run_it.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    loops = [asyncio.run, uvloop.run]
    return pytest.mark.parametrize("run", loops, ids=["asyncio", "uvloop"])(run_it)


@asynccontextmanager
async def linked(
    app: ASGIApp,
    *,
    options: LinkOptions | None = None,
    load: Callable[[], Load] | None = None,
    resumes: bool = False,
) -> AsyncIterator[tuple[LinkServer, LinkClient]]:
    server = LinkServer(app, SECRET, options=options, load=load, resumes=resumes)
    host, port = await server.start()
    client = LinkClient(host, port, SECRET, options=options)
    try:
        await client.connect()
        yield server, client
    finally:
        await client.close()
        await server.stop()


async def receive_body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def send_head(send: Send, status: int = 200) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Send the request's body back in one message."""
    body = await receive_body(receive)
    await send_head(send)
    await send_body(send, body, more=False)


async def hang(scope: Scope, receive: Receive, send: Send) -> None:
    """Send a head and one byte, then hang."""
    await send_head(send)
    await send_body(send, b"!")
    await asyncio.Future()


async def read_all(stream: ClientStream) -> bytes:
    pieces = []
    while piece := await stream.read():
        pieces.append(piece)
    return b"".join(pieces)


async def ask(client: LinkClient, path: str = "/", body: Any = b"") -> tuple[int, bytes]:
    stream = client.open(RequestHead(method="POST", path=path), body)
    return (await stream.head()).status, await read_all(stream)


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    while not condition():  # noqa: ASYNC110, the condition has no event
        await asyncio.sleep(0.001)


class RawPeer:
    """A peer that the test controls frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._decoder = FrameDecoder(MAX_PAYLOAD_BYTES)
        self._frames: list[Frame] = []

    @classmethod
    async def dial(cls, address: tuple[str, int]) -> "RawPeer":
        return cls(*await asyncio.open_connection(*address))

    async def next_frame(self) -> Frame:
        while not self._frames:
            data = await self.reader.read(65536)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def shake(self, role: str, window_bytes: int = 1000) -> None:
        handshake = Handshake(cast(Any, role), SECRET, window_bytes)
        self.writer.write(handshake.hello())
        while not handshake.done:
            _, kind, _, payload = await self.next_frame()
            self.writer.write(handshake.receive(kind, payload))

    async def wait_closed_by_peer(self) -> None:
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def raw_server(
    serve: Callable[[RawPeer], Awaitable[None]],
) -> AsyncIterator[tuple[str, int]]:
    """Listen, and pass each connection to ``serve``, then close it."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        peer = RawPeer(reader, writer)
        try:
            with suppress(asyncio.CancelledError):  # asyncio.start_server logs it as an error
                await serve(peer)
                await peer.close()
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
