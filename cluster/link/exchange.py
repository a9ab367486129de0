"""One request as the replica's application sees it: an ASGI scope, ``receive`` and ``send``.

Owns the request's body as far as it arrived and was not received (at most the window and one
frame). Knows the connection that it writes to, not the server around it.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from cluster.asgi import USAGE, Message, Scope
from cluster.errors import LinkClosedError, LinkProtocolError, RequestError
from cluster.link import frames
from cluster.link.connection import Connection
from cluster.link.flow import SendSide, Signal
from cluster.link.frames import (
    CHUNK_BYTES,
    DATA,
    END,
    ERROR,
    MAX_PAYLOAD_BYTES,
    RESPONSE,
    TOKENS,
    WINDOW,
    RequestHead,
    ResponseHead,
    encode_credit,
    encode_head,
    encode_tokens,
)
from cluster.usage import UsageCounter

logger = logging.getLogger(__name__)

TOKEN_IDS = "tandem.token_ids"
"""Key of an ``http.response.body`` message: the ids of the tokens that its bytes belong to."""


def scope_of(
    head: RequestHead, usage: UsageCounter, server: tuple[str, int], client: tuple[str, int]
) -> Scope:
    """The ASGI scope; spec 2.4, so Starlette streams without a task that waits for the end."""
    headers: list[tuple[bytes, bytes]] = list(head.headers)
    if head.request_id and not any(name == b"x-request-id" for name, _ in headers):
        headers.append((b"x-request-id", head.request_id.encode()))
    return {
        "type": "http",
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


class Exchange:
    """A stream that the application answers.

    ``gone`` says that the router wants no more of it; ``complete`` that the response was sent.
    """

    __slots__ = (
        "_body_ended",
        "_body_received",
        "_changed",
        "_chunks",
        "_connection",
        "_due",
        "_sender",
        "complete",
        "gone",
        "head",
        "started",
        "stream_id",
        "task",
        "usage",
    )

    def __init__(
        self, connection: Connection, stream_id: int, head: RequestHead, has_body: bool
    ) -> None:
        self.stream_id = stream_id
        self.head = head
        self.usage = UsageCounter()
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.complete = False
        self.gone = False
        self._connection = connection
        self._sender = SendSide(connection, stream_id)
        self._chunks: list[bytes] = []
        self._due = 0
        self._body_ended = not has_body
        self._body_received = False
        self._changed = Signal()

    # -- for the application --

    async def receive(self) -> Message:
        """The next piece of the body; then ``http.disconnect``, once there is nobody to answer."""
        while not (self.gone or self.complete):
            if self._chunks or (self._body_ended and not self._body_received):
                return self._next_body()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the head or a piece of the body; waits only while the router is too far behind.

        Raises:
            OSError: the router is gone (so ASGI 2.4 has it).
        """
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            sender = self._sender
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
        """The ASGI scope of this request."""
        return scope_of(self.head, self.usage, server, self.head.client or client)

    def on_body(self, payload: bytes, end: bool) -> None:
        """A piece of the request's body arrived."""
        if self._body_ended:
            raise LinkProtocolError("BODY after its end")
        self._due += len(payload)
        if self._due > self._connection.options.window_bytes + MAX_PAYLOAD_BYTES:
            raise LinkProtocolError("the peer sent more than the stream's window")
        if payload:
            self._chunks.append(payload)
        self._body_ended = end
        self._changed.fire()

    def on_credit(self, credit_bytes: int) -> None:
        """The router has read so much of the response."""
        self._sender.grant(credit_bytes)

    def leave(self) -> None:
        """The router cancelled, or its connection ended: disconnect and cancel the application."""
        if not (self.complete or self.gone):
            self.gone = True
            self._finish()
            if self.task is not None:
                self.task.cancel()

    def settle(self, task: asyncio.Task[None]) -> None:
        """The application returned, raised or was cancelled: make sure that the stream ended."""
        if task.cancelled():
            self._fail(503, "the replica stopped before the answer was complete")
            return
        error = task.exception()
        if error is None:
            self._fail(500, "the application ended without a whole response")
        elif isinstance(error, RequestError):
            self._fail(error.status, error.message)
        elif not self.gone:
            head = self.head
            logger.error("%s: %s %s failed", head.id, head.method, head.path, exc_info=error)
            self._fail(500, "the replica failed to answer; its log says why")

    # -- inside --

    def _next_body(self) -> Message:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._body_ended:
            self._body_received = True
        elif self._due >= self._connection.options.window_bytes // 2:
            self._connection.write(self.stream_id, WINDOW, 0, encode_credit(self._due))
            self._due = 0
        return {"type": "http.request", "body": body, "more_body": not self._body_ended}

    def _send_head(self, message: Message) -> None:
        if message["type"] != "http.response.start" or self.started:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")
        self._check_open()
        self.started = True
        head = ResponseHead(message["status"], _pairs(message.get("headers", ())))
        self._connection.write(self.stream_id, RESPONSE, 0, encode_head(head))

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
                await self._sender.send(DATA, body, end)
        except LinkClosedError:
            self._check_open()
        if end:
            self._finish()

    async def _send_tokens(self, token_ids: Sequence[int], body: bytes, end: bool) -> bytes:
        """Send the ids with the first piece of their bytes; returns the bytes that are left."""
        await self._sender.ready()
        rest = body[CHUNK_BYTES:]
        payload = encode_tokens(token_ids) + body[:CHUNK_BYTES]
        self._sender.credit -= len(payload)
        flags = TOKENS | END if end and not rest else TOKENS
        self._connection.write(self.stream_id, DATA, flags, payload)
        return rest

    def _send_usage(self) -> None:
        if (said := self.usage.report()) is not None:
            self._connection.write(self.stream_id, frames.USAGE, 0, encode_head(said))

    def _check_open(self) -> None:
        if self.complete:
            raise RuntimeError("an ASGI message after the end of the response")
        if self.gone or not self._sender.open:
            raise OSError("the client is gone")

    def _fail(self, status: int, message: str) -> None:
        if not (self.complete or self.gone):
            self._connection.write(self.stream_id, ERROR, 0, encode_head((status, message)))
            self.gone = True
            self._finish()

    def _finish(self) -> None:
        self.complete = not self.gone
        self._sender.close()
        self._changed.fire()


def _pairs(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in headers]
