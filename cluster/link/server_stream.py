"""The replica's side of one request: an ASGI scope, ``receive`` and ``send``."""

import asyncio
import logging
from typing import Any
from urllib.parse import quote
from zlib import crc32

from cluster.asgi import IS_CANCELLED, JOURNAL, USAGE, Journal, Message, Scope
from cluster.errors import (
    HandoverError,
    InternalError,
    LinkClosedError,
    LinkProtocolError,
    RequestError,
)
from cluster.link import frames
from cluster.link.connection import Connection, Signal
from cluster.link.frames import (
    CHUNK_BYTES,
    DATA,
    END,
    JOURNAL_FORMAT,
    LONG_ENTRIES,
    RequestHead,
    ResponseHead,
    encode_head,
)
from cluster.link.stream_sender import StreamSender
from cluster.usage import UsageCounter

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 64 * 1024
"""Characters of an error's message that fit a frame in any case."""


class ServerStream:
    """A request that the application answers.

    ``disconnected`` is True once the router wants no more of it, ``complete`` once the response
    was sent. Buffers the request body that was not received yet (at most the window and one
    frame), and the journal of an answer that is to be continued.
    """

    def __init__(
        self, connection: Connection, stream_id: int, head: RequestHead, has_body: bool
    ) -> None:
        self.stream_id = stream_id
        self.head = head
        self.usage = UsageCounter()
        self.report_usage = self.usage.report
        """Returns the usage for the router."""
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.complete = False
        self.disconnected = False
        self.is_lost = False
        """True if the stream ended because the connection to the router was lost."""
        self.is_final = False
        """True if the router cancelled the stream, and the request will not be repeated."""
        self._connection = connection
        self.sender = StreamSender(connection, stream_id)
        self.journal = Journal() if head.keeps_journal else None
        self._ends_old_journal = head.keeps_journal and head.journal_format != JOURNAL_FORMAT
        if self.journal is not None and self._ends_old_journal:
            self.journal.close()
        resume = head.resume
        self._journal_left = resume.journal_bytes if resume is not None else 0  # to be received
        self._skip_left = resume.body_bytes if resume is not None else 0  # the client has them
        self._checksum = 0  # of the bytes that the client has
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
            sender, journal = self.sender, self.journal
            # Fast path, once for each token: write at once if nothing makes the frame wait.
            if (
                type(body) is bytes
                and len(body) <= CHUNK_BYTES
                and sender.credit > 0
                and sender.open
                and self.started
                and sender.connection.writable
                and not self._skip_left
                and (journal is None or len(journal.unsent) < LONG_ENTRIES)
            ):
                entries = b""
                if journal is not None and body:
                    entries, journal.unsent = journal.unsent, b""
                if not message.get("more_body"):
                    self._send_usage()
                    sender.connection.write_data(self.stream_id, END, entries, body)
                    self._finish()
                elif body:
                    sender.credit -= len(body)
                    sender.connection.write_data(self.stream_id, 0, entries, body)
            else:
                await self._send_body(bytes(body), message)
        else:
            self._send_head(message)

    # -- for the connection --

    def scope(self, server: tuple[str, int], client: tuple[str, int]) -> Scope:
        scope = request_scope(self.head, self.usage, server, self.head.client or client)
        if self.journal is not None:
            scope["extensions"][JOURNAL] = self.journal
        scope["extensions"][IS_CANCELLED] = lambda: self._cancelled and self.is_final
        return scope

    def on_body(self, payload: bytes, end: bool) -> None:
        if self._body_ended:
            raise LinkProtocolError("BODY after its end")
        self._uncredited += len(payload)
        if self._uncredited > self._connection.options.window_bytes + frames.MAX_PAYLOAD_BYTES:
            raise LinkProtocolError("the peer sent more than the stream's window")
        if self._journal_left:
            payload = self._receive_journal(payload)
        if payload:
            self._chunks.append(payload)
        self._body_ended = end
        self._changed.fire()

    def disconnect(self, *, is_lost: bool = False, is_final: bool = False) -> None:
        """Cancel the application: the router cancelled, or its connection was lost."""
        if not (self.complete or self.disconnected):
            self.is_lost, self.is_final = is_lost, is_final
            self.disconnected = self._cancelled = True
            self._finish()
            if self.task is not None:
                self.task.cancel()

    def on_task_done(self, task: asyncio.Task[None]) -> None:
        """Send an error unless the application has sent a complete response.

        A cancelled stream ends with its usage until then.
        """
        if self._cancelled and not self.is_lost:
            self._send_usage()
            self._connection.write(self.stream_id, DATA, END)
        self.task = None  # its exception refers to this stream: they would be a cycle
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

    def _receive_journal(self, payload: bytes) -> bytes:
        """Take the journal's part of a BODY frame; return the rest."""
        piece = payload[: self._journal_left]
        self._journal_left -= len(piece)
        if self.journal is not None:
            self.journal.earlier += piece
        self._uncredited -= len(piece)
        credit = frames.encode_credit(len(piece))
        self._connection.write(self.stream_id, frames.WINDOW, 0, credit)
        return payload[len(piece) :]

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
        head = encode_head(response_head(message))
        if len(head) > frames.MAX_PAYLOAD_BYTES:
            raise InternalError(
                f"The headers of the response are {len(head)} bytes; the limit between router and "
                f"replica is {frames.MAX_PAYLOAD_BYTES} bytes."
            )
        self.started = True
        self._connection.write(self.stream_id, frames.RESPONSE, 0, head)
        if self._ends_old_journal:
            self._connection.write(self.stream_id, DATA, frames.JOURNAL, frames.OLD_NO_JOURNAL)

    async def _send_body(self, body: bytes, message: Message) -> None:
        if not self.started:
            raise RuntimeError("http.response.body before http.response.start")
        self._check_open()
        end = not message.get("more_body", False)
        if self._skip_left:
            body = self._skip(body, end)
        if end:
            self._send_usage()
        try:
            if body and self.journal is not None and self.journal.unsent:
                await self.sender.wait_ready()
                piece, body = body[:CHUNK_BYTES], body[CHUNK_BYTES:]
                self.sender.credit -= len(piece)
                payload = self._take_entries(self.journal) + piece
                self._connection.write(self.stream_id, DATA, frames.JOURNAL, payload)
            if body or end:
                await self.sender.send(DATA, body, end)
        except LinkClosedError:
            self._check_open()
        if end:
            self._finish()

    def _take_entries(self, journal: Journal) -> bytes:
        """Return the unsent entries, of any number, as a JOURNAL frame has them."""
        entries, journal.unsent = journal.unsent, b""
        if len(entries) > frames.MAX_ENTRIES_BYTES:
            self.journal = None
            journal.close()
            return frames.pack_long_size(LONG_ENTRIES, frames.NO_JOURNAL)
        return frames.pack_long_size(LONG_ENTRIES, len(entries)) + entries

    def _skip(self, body: bytes, end: bool) -> bytes:
        """Return the part of a piece of the body that the client does not have.

        Raises:
            OSError: The client has something else; the stream has ended with an error.
        """
        skipped = body[: self._skip_left]
        self._skip_left -= len(skipped)
        self._checksum = crc32(skipped, self._checksum)
        resume = self.head.resume
        is_over = end or not self._skip_left
        if (
            resume is not None
            and is_over
            and (self._skip_left or self._checksum != resume.checksum)
        ):
            logger.warning("%s: the answer cannot be continued: it differs", self.head.id)
            self._send_error(HandoverError.status, HandoverError.DIFFERS)
            raise OSError("the answer cannot be continued")
        return body[len(skipped) :]

    def _send_usage(self) -> None:
        if (usage := self.report_usage()) is not None:
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


def request_scope(
    head: RequestHead, usage: UsageCounter, server: tuple[str, int], client: tuple[str, int]
) -> Scope:
    """Return the ASGI scope of a request."""
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


def response_head(message: Message) -> ResponseHead:
    """Return the head of a response from its ASGI message."""
    headers: Any = message.get("headers", ())
    return ResponseHead(message["status"], [(bytes(name), bytes(value)) for name, value in headers])
