"""The router's side of one request: response head, body, usage and end.

Buffers what has arrived and was not read (at most the window and one frame), and owns the task
that sends a large request body.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Self

from cluster.errors import LinkClosedError, LinkProtocolError
from cluster.link import frames
from cluster.link.connection import Connection
from cluster.link.frames import END, JOURNAL, ResponseHead
from cluster.link.record import AnswerRecord, split_payload
from cluster.link.stream_sender import StreamSender
from cluster.usage import Usage

logger = logging.getLogger(__name__)


class ClientStream:
    """An open request, read by exactly one task.

    Leaving it as a context manager cancels it unless it has ended. A stream that is neither read
    to its end nor cancelled stays open on the replica.

    ``on_finished`` is called once when the replica has finished: with the end of the response,
    even if it has not been read; with an error; or after ``cancel``, when ``usage`` has the usage
    until then, or the replica did not report it in time.
    """

    def __init__(
        self,
        connection: Connection,
        stream_id: int,
        on_end: Callable[["ClientStream", bool], object],
    ) -> None:
        self.stream_id = stream_id
        self.sender = StreamSender(connection, stream_id)
        self.usage: Usage | None = None
        """Usage of the request; set at its end if the application reports it."""
        self.on_finished: Callable[[], object] | None = None
        self.record: AnswerRecord | None = None
        """Record of what arrives, if the reader sets it before it waits for the head."""
        self.arrivals_s: list[float] | None = None
        """Times at which pieces of the body arrived (``time.perf_counter``), if it is a list."""
        self.sink: Callable[[bytes], bool] | None = None
        """Takes pieces of the body as they arrive while ``read`` waits, so no task has to wake up.
        ``read`` returns the pieces for which it returns False, and the last one."""
        self.was_held_back = False
        """True if the replica had to wait for the reader, so its times are not its own."""
        self._connection = connection
        self._create_future = connection.loop.create_future
        self._on_end = on_end
        self._half_window = connection.options.window_bytes // 2
        self._head: ResponseHead | None = None
        self._chunks: list[bytes] = []
        self._uncredited = 0  # received bytes for which the peer has not got new credit
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._upload: asyncio.Task[None] | None = None

    # -- for the reader --

    async def head(self) -> ResponseHead:
        """Return the response's head.

        Raises:
            LinkClosedError: the connection ended.
            LinkRefusedError: the replica drains and did not start the request.
            RequestError: the replica failed; the class matches its HTTP status.
        """
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._head

    async def read(self) -> bytes:
        """Return everything that has arrived, waiting for at least one byte; b"" at the end.

        Raises:
            Exception: as ``head`` does, after everything that arrived before has been read.
        """
        chunks = self._chunks
        while not chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            await self._wait()
        self._clear_chunks()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @property
    def ended(self) -> bool:
        """True once the replica has finished; data that arrived before can still be read."""
        return self._ended or self._error is not None

    @property
    def error(self) -> Exception | None:
        """Reason why the stream failed or was cancelled, if it was."""
        return self._error

    def cancel(self, *, is_final: bool = True) -> None:
        """Stop the work on the replica and drop unread data; safe to call at any time.

        Args:
            is_final: False if the client may repeat the request with its idempotency key.
        """
        self._chunks.clear()
        self._abort(LinkClosedError("the stream was cancelled"), is_final=is_final)

    def abandon(self, error: Exception) -> None:
        """Stop the work on the replica; ``read`` returns what has arrived, then raises."""
        self._abort(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    # -- for the connection --

    def on_response(self, payload: bytes) -> None:
        if self._head is not None:
            raise LinkProtocolError("a second RESPONSE on one stream")
        self._head = frames.decode_head(payload, ResponseHead)
        self._wake()

    def on_data(self, flags: int, payload: bytes) -> None:
        if self._head is None:
            raise LinkProtocolError("DATA before RESPONSE")
        if payload:
            times = self.arrivals_s
            if times is not None and not (times and times[-1] == self._connection.received_s):
                times.append(self._connection.received_s)
            record = self.record
            if record is not None:
                payload = record.add(flags, payload)
            elif flags & JOURNAL:
                payload = split_payload(payload)[1]
            self._uncredited += len(payload)
            if self._uncredited >= 2 * self._half_window:
                self._use_up_window()
            if payload:
                sink, waiter = self.sink, self._waiter
                # Only while the reader waits has it passed on everything that arrived before.
                is_awaited = waiter is not None and not waiter.done()
                if (
                    sink is not None
                    and is_awaited
                    and not flags & END
                    and self._pass_on(sink, payload)
                ):
                    return
                self._chunks.append(payload)
        if flags & END:
            self._ended = True
            self._close()
            self.finish()
        else:
            # ``_wake`` inlined: this runs once for each token.
            waiter = self._waiter
            if waiter is not None:
                self._waiter = None
                if not waiter.done():
                    waiter.set_result(None)

    def _pass_on(self, sink: Callable[[bytes], bool], piece: bytes) -> bool:
        try:
            if not sink(piece):
                return False
        except Exception as error:  # must not end the other streams of the link
            self._abort(error)
            return True
        if self._uncredited >= self._half_window:
            self._send_credit()
        return True

    def _use_up_window(self) -> None:
        self.was_held_back = True
        if self._uncredited > 2 * self._half_window + frames.MAX_PAYLOAD_BYTES:
            raise LinkProtocolError("the peer sent more than the stream's window")

    def fail(self, error: Exception) -> None:
        """End the stream with an error unless it has ended."""
        if not self.ended:
            self._error = error
            self._close()
            self.finish()

    def finish(self) -> None:
        """Call ``on_finished``, once: the replica does nothing more for this stream."""
        on_finished, self.on_finished = self.on_finished, None
        if on_finished is not None:
            try:
                on_finished()
            except Exception:  # must not end the other streams of the link
                logger.exception("a callback of stream %d failed", self.stream_id)

    def start_upload(self, body: bytes | AsyncIterator[bytes]) -> asyncio.Task[None]:
        self._upload = asyncio.create_task(self._send_body(body))
        return self._upload

    async def _send_body(self, body: bytes | AsyncIterator[bytes]) -> None:
        try:
            if isinstance(body, bytes):
                await self.sender.send(frames.BODY, body, True)
                return
            try:
                async for piece in body:
                    if piece:
                        await self.sender.send(frames.BODY, piece, False)
                await self.sender.send(frames.BODY, b"", True)
            finally:
                if isinstance(body, AsyncGenerator):
                    await body.aclose()
        except LinkClosedError:
            pass  # the response ended first, or the reader gets the connection's error
        except Exception as error:  # an error of the body's source fails only this stream
            self._abort(error)

    def _abort(self, error: Exception, *, is_final: bool = True) -> None:
        if not self.ended:
            self._connection.write(self.stream_id, frames.CANCEL, END if is_final else 0)
            self._error = error
            self._close(reports=self.on_finished is not None)

    def _close(self, *, reports: bool = False) -> None:
        """End the stream for its reader; if it ``reports``, the replica's usage is awaited."""
        self._on_end(self, reports)
        self.sink = None  # its owner refers to this stream: they would be a cycle
        self.sender.close()
        if self._upload is not None:
            self._upload.cancel()
        self._wake()

    def _clear_chunks(self) -> None:
        self._chunks = []
        if self._uncredited >= self._half_window and not self._ended:
            self._send_credit()

    def _send_credit(self) -> None:
        credit = frames.encode_credit(self._uncredited)
        self._connection.write(self.stream_id, frames.WINDOW, 0, credit)
        self._uncredited = 0

    def _wait(self) -> asyncio.Future[None]:
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("two tasks read one stream")
        self._waiter = self._create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
