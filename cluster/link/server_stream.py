"""The replica's side of one request: an ASGI scope, ``receive`` and ``send``.

``ServerStream`` carries a request that arrived over a link; ``answer_locally`` runs a request in
the same process without a link.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from urllib.parse import quote

from cluster.asgi import USAGE, ASGIApp, Message, Scope
from cluster.errors import InternalError, LinkClosedError, LinkProtocolError, RequestError
from cluster.link import frames
from cluster.link.connection import Connection, Signal, StreamSender
from cluster.link.frames import CHUNK_BYTES, DATA, END, RequestHead, ResponseHead, encode_head
from cluster.usage import Usage, UsageCounter

logger = logging.getLogger(__name__)

TOKEN_IDS = "tandem.token_ids"
"""Key of an ``http.response.body`` message: ids of the tokens in its body."""
MAX_UNREAD_BYTES = 256 * 1024
"""Bytes by which a local application may be ahead of its reader before ``send`` waits."""
MAX_ERROR_CHARS = 64 * 1024
"""Characters of an error's message that fit a frame in any case."""
_LOCAL_ADDRESS = ("127.0.0.1", 0)


class ServerStream:
    """A request that the application answers.

    ``disconnected`` is True once the router wants no more of it, ``complete`` once the response
    was sent. Buffers the request body that was not received yet (at most the window and one
    frame).
    """

    def __init__(
        self, connection: Connection, stream_id: int, head: RequestHead, has_body: bool
    ) -> None:
        self.stream_id = stream_id
        self.head = head
        self.usage = UsageCounter()
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.complete = False
        self.disconnected = False
        self._connection = connection
        self.sender = StreamSender(connection, stream_id)
        self._chunks: list[bytes] = []
        self._uncredited = 0  # received bytes for which the peer has not got new credit
        self._body_ended = not has_body
        self._body_received = False
        self._cancelled = False
        self._changed = Signal()

    # -- for the application --

    async def receive(self) -> Message:
        """Return the next piece of the body, then wait for the end and return a disconnect."""
        while not (self.disconnected or self.complete):
            if self._chunks or (self._body_ended and not self._body_received):
                return self._next_body()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the head or a piece of the body; wait while the router is too far behind.

        Raises:
            OSError: the router is gone, as ASGI 2.4 requires.
        """
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            sender = self.sender
            # Fast path, once for each token: write at once if nothing makes the frame wait.
            if (
                type(body) is bytes
                and len(body) <= CHUNK_BYTES
                and sender.credit > 0
                and sender.open
                and self.started
                and sender.connection.writable
                and TOKEN_IDS not in message
            ):
                if not message.get("more_body"):
                    self._send_usage()
                    sender.connection.write(self.stream_id, DATA, END, body)
                    self._finish()
                elif body:
                    sender.credit -= len(body)
                    sender.connection.write(self.stream_id, DATA, 0, body)
            else:
                await self._send_body(bytes(body), message)
        else:
            self._send_head(message)

    # -- for the connection --

    def scope(self, server: tuple[str, int], client: tuple[str, int]) -> Scope:
        return _scope(self.head, self.usage, server, self.head.client or client)

    def on_body(self, payload: bytes, end: bool) -> None:
        if self._body_ended:
            raise LinkProtocolError("BODY after its end")
        self._uncredited += len(payload)
        if self._uncredited > self._connection.options.window_bytes + frames.MAX_PAYLOAD_BYTES:
            raise LinkProtocolError("the peer sent more than the stream's window")
        if payload:
            self._chunks.append(payload)
        self._body_ended = end
        self._changed.fire()

    def disconnect(self) -> None:
        """Cancel the application: the router cancelled, or its connection ended."""
        if not (self.complete or self.disconnected):
            self.disconnected = self._cancelled = True
            self._finish()
            if self.task is not None:
                self.task.cancel()

    def on_task_done(self, task: asyncio.Task[None]) -> None:
        """Send an error unless the application has sent a complete response.

        A cancelled stream ends with its usage until then.
        """
        if self._cancelled:
            self._send_usage()
            self._connection.write(self.stream_id, DATA, END)
        if task.cancelled():
            self._send_error(
                503, "The replica stopped before the response was complete; try again."
            )
            return
        error = task.exception()
        if error is None:
            self._send_error(500, "the application returned without a complete response")
        elif isinstance(error, RequestError):
            self._send_error(error.status, error.message)
        elif not self.disconnected:
            head = self.head
            logger.error("%s: %s %s failed", head.id, head.method, head.path, exc_info=error)
            self._send_error(500, "the replica failed to answer; its log has the traceback")

    # -- internals --

    def _next_body(self) -> Message:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._body_ended:
            self._body_received = True
        elif self._uncredited >= self._connection.options.window_bytes // 2:
            credit = frames.encode_credit(self._uncredited)
            self._connection.write(self.stream_id, frames.WINDOW, 0, credit)
            self._uncredited = 0
        return {"type": "http.request", "body": body, "more_body": not self._body_ended}

    def _send_head(self, message: Message) -> None:
        if message["type"] != "http.response.start" or self.started:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")
        self._check_open()
        head = encode_head(_response_head(message))
        if len(head) > frames.MAX_PAYLOAD_BYTES:
            raise InternalError(
                f"The headers of the response are {len(head)} bytes; the limit between router and "
                f"replica is {frames.MAX_PAYLOAD_BYTES} bytes."
            )
        self.started = True
        self._connection.write(self.stream_id, frames.RESPONSE, 0, head)

    async def _send_body(self, body: bytes, message: Message) -> None:
        if not self.started:
            raise RuntimeError("http.response.body before http.response.start")
        self._check_open()
        end = not message.get("more_body", False)
        if end:
            self._send_usage()
        token_ids: Sequence[int] = message.get(TOKEN_IDS) or ()
        try:
            if token_ids:
                body = await self._send_tokens(token_ids, body, end)
            if body or (end and not token_ids):
                await self.sender.send(DATA, body, end)
        except LinkClosedError:
            self._check_open()
        if end:
            self._finish()

    async def _send_tokens(self, token_ids: Sequence[int], body: bytes, end: bool) -> bytes:
        """Send the ids with the first piece of the body; return the rest of the body."""
        await self.sender.wait_ready()
        rest = body[CHUNK_BYTES:]
        payload = frames.encode_tokens(token_ids) + body[:CHUNK_BYTES]
        self.sender.credit -= len(payload)
        flags = frames.TOKENS | END if end and not rest else frames.TOKENS
        self._connection.write(self.stream_id, DATA, flags, payload)
        return rest

    def _send_usage(self) -> None:
        if (usage := self.usage.report()) is not None:
            self._connection.write(self.stream_id, frames.USAGE, 0, encode_head(usage))

    def _check_open(self) -> None:
        if self.complete:
            raise RuntimeError("an ASGI message after the end of the response")
        if self.disconnected or not self.sender.open:
            raise OSError("the client is gone")

    def _send_error(self, status: int, message: str) -> None:
        if not (self.complete or self.disconnected):
            error = encode_head((status, message[:MAX_ERROR_CHARS]))
            self._connection.write(self.stream_id, frames.ERROR, 0, error)
            self.disconnected = True
            self._finish()

    def _finish(self) -> None:
        self.complete = not self.disconnected
        self.sender.close()
        self._changed.fire()


async def answer_locally(
    app: ASGIApp, head: RequestHead, body: bytes
) -> AsyncGenerator[ResponseHead | bytes | Usage, None]:
    """Yield an application's response: its head, its body in pieces, and its usage if known.

    Each piece is everything that has been sent since the last one. Closing the generator cancels
    the application.

    Raises:
        InternalError: the application ended without a response.
        Exception: any exception of the application.
    """
    call = _LocalCall(body)
    scope = _scope(head, call.usage, _LOCAL_ADDRESS, head.client or _LOCAL_ADDRESS)
    task = asyncio.ensure_future(app(scope, call.receive, call.send))
    task.add_done_callback(call.on_task_done)
    try:
        head_sent, chunks = False, b""
        while True:
            if not head_sent and call.head is not None:
                head_sent = True
                yield call.head
            if chunks:
                yield chunks
            if task.done() and not call.chunks:
                break
            chunks = await call.read()
        await task
        if call.head is None:
            raise InternalError("the application ended without a response")
        if (usage := call.usage.report()) is not None:
            yield usage
    finally:
        task.cancel()


class _LocalCall:
    """ASGI messages between an application and the reader of its response."""

    def __init__(self, body: bytes) -> None:
        self.head: ResponseHead | None = None
        self.usage = UsageCounter()
        self.changed = asyncio.Event()
        self._body: bytes | None = body
        self.chunks: list[bytes] = []  # not read yet
        self._num_bytes = 0
        self._has_room = asyncio.Event()

    def on_task_done(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled():
            task.exception()  # a reader that left does not ask for it, and asyncio would log it
        self.changed.set()

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Future()  # the task is cancelled when the reader closes the generator
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.head = _response_head(message)
            self.changed.set()
            return
        chunk = bytes(message.get("body", b""))
        self.chunks.append(chunk)
        self._num_bytes += len(chunk)
        self.changed.set()
        while self._num_bytes > MAX_UNREAD_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    async def read(self) -> bytes:
        """Return everything that was sent since the last call, waiting if that is nothing."""
        if not self.chunks:
            await self.changed.wait()
        self.changed.clear()
        data = b"".join(self.chunks)
        self.chunks.clear()
        self._num_bytes = 0
        self._has_room.set()
        return data


def _scope(
    head: RequestHead, usage: UsageCounter, server: tuple[str, int], client: tuple[str, int]
) -> Scope:
    headers: list[tuple[bytes, bytes]] = list(head.headers)
    if head.request_id and not any(name == b"x-request-id" for name, _ in headers):
        headers.append((b"x-request-id", head.request_id.encode()))
    return {
        "type": "http",
        # With spec 2.4 Starlette streams without a second task that waits for the disconnect.
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": head.method,
        "scheme": head.scheme,
        "path": head.path,
        "raw_path": head.raw_path or quote(head.path).encode(),
        "query_string": head.query_string,
        "root_path": "",
        "headers": headers,
        "client": client,
        "server": server,
        "state": {},
        "extensions": {USAGE: usage},
    }


def _response_head(message: Message) -> ResponseHead:
    headers: Any = message.get("headers", ())
    return ResponseHead(message["status"], [(bytes(name), bytes(value)) for name, value in headers])
