"""One request as the router sees it: its response head, its bytes, its tokens, its end.

Owns what arrived and was not read yet (at most the window and one frame), and the task that
sends a large body. Does not know how a connection comes about.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import NamedTuple, Self, cast

from cluster.errors import LinkClosedError, LinkProtocolError
from cluster.link.connection import Connection
from cluster.link.flow import SendSide
from cluster.link.frames import (
    BODY,
    CANCEL,
    END,
    MAX_PAYLOAD_BYTES,
    TOKENS,
    WINDOW,
    ResponseHead,
    decode_head,
    decode_tokens,
    encode_credit,
    tokens_end,
)
from cluster.usage import Usage


class Chunk(NamedTuple):
    """A piece of a response as the application sent it."""

    data: bytes
    token_ids: tuple[int, ...]
    """The tokens that the bytes belong to; empty where the application named none."""


class Stream:
    """An open request. Exactly one task reads it.

    Leaving it as a context manager cancels it unless it has ended. A stream that is neither read
    to its end nor cancelled stays open on the replica.
    """

    __slots__ = (
        "_chunks",
        "_connection",
        "_create_future",
        "_due",
        "_ended",
        "_error",
        "_forget",
        "_half",
        "_head",
        "_pump",
        "_tagged",
        "_waiter",
        "sender",
        "stream_id",
        "usage",
    )

    def __init__(
        self, connection: Connection, stream_id: int, forget: Callable[[int], object]
    ) -> None:
        self.stream_id = stream_id
        self.sender = SendSide(connection, stream_id)
        self.usage: Usage | None = None
        """The tokens that it took; known at its end, where the application counts them."""
        self._connection = connection
        self._create_future = connection.loop.create_future
        self._forget = forget
        self._half = connection.options.window_bytes // 2
        self._head: ResponseHead | None = None
        self._chunks: list[bytes | tuple[bytes, int]] = []  # the pair: payload, end of its ids
        self._tagged = False
        self._due = 0  # bytes that the peer has not been credited for
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pump: asyncio.Task[None] | None = None

    # -- for the one who reads --

    async def head(self) -> ResponseHead:
        """The response's head.

        Raises:
            LinkClosedError: the connection ended.
            LinkRefusedError: the replica drains and did not start this.
            RequestError: the replica could not answer; of the class that its status has.
        """
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._next()
        return self._head

    async def read(self) -> bytes:
        """Everything that has arrived, waiting only if that is nothing; b"" at the end.

        Raises what ``head`` does, after all that arrived before was read.
        """
        while True:
            chunks = self._chunks
            while not chunks:
                if self._error is not None:
                    raise self._error
                if self._ended:
                    return b""
                await self._next()
            self._take()
            if not self._tagged:
                plain = cast(list[bytes], chunks)
                return plain[0] if len(plain) == 1 else b"".join(plain)
            data = b"".join([c if isinstance(c, bytes) else c[0][c[1] :] for c in chunks])
            if data:  # tokens may come without bytes, which must not look like the end
                return data

    async def read_chunks(self) -> list[Chunk]:
        """Like ``read``, but in the application's chunks and with their tokens; [] at the end."""
        chunks = self._chunks
        while not chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return []
            await self._next()
        self._take()
        return [
            Chunk(c, ()) if isinstance(c, bytes) else Chunk(c[0][c[1] :], decode_tokens(c[0]))
            for c in chunks
        ]

    @property
    def ended(self) -> bool:
        """Whether the replica is done with this stream; what arrived may still be read."""
        return self._ended or self._error is not None

    def cancel(self) -> None:
        """End the work on the replica; nothing more can be read. Safe to call at any time."""
        self._chunks.clear()
        self._abort(LinkClosedError("the stream was cancelled"))

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
        """The head arrived."""
        if self._head is not None:
            raise LinkProtocolError("a second RESPONSE on one stream")
        self._head = decode_head(payload, ResponseHead)
        self._wake()

    def on_data(self, flags: int, payload: bytes) -> None:
        """A piece of the response arrived."""
        if self._head is None:
            raise LinkProtocolError("DATA before RESPONSE")
        if payload:
            self._due += len(payload)
            if self._due > 2 * self._half + MAX_PAYLOAD_BYTES:
                raise LinkProtocolError("the peer sent more than the stream's window")
            if flags & TOKENS:
                self._tagged = True
                self._chunks.append((payload, tokens_end(payload)))
            else:
                self._chunks.append(payload)
        if flags & END:
            self._ended = True
            self._finish()
        else:
            waiter = self._waiter
            if waiter is not None:
                self._waiter = None
                if not waiter.done():
                    waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """The stream ended before its time."""
        if not self.ended:
            self._error = error
            self._finish()

    def pump(self, body: bytes | AsyncIterator[bytes]) -> asyncio.Task[None]:
        """Start to send a body that is large or not there yet."""
        self._pump = asyncio.create_task(self._send_body(body))
        return self._pump

    async def _send_body(self, body: bytes | AsyncIterator[bytes]) -> None:
        try:
            if isinstance(body, bytes):
                await self.sender.send(BODY, body, True)
                return
            try:
                async for piece in body:
                    if piece:
                        await self.sender.send(BODY, piece, False)
                await self.sender.send(BODY, b"", True)
            finally:
                if isinstance(body, AsyncGenerator):
                    await body.aclose()
        except LinkClosedError:
            pass  # the response ended first, or its reader knows why not
        except Exception as error:  # whatever the body's source raises fails this stream alone
            self._abort(error)

    def _abort(self, error: Exception) -> None:
        if not self.ended:
            self._connection.write(self.stream_id, CANCEL)
            self.fail(error)

    def _finish(self) -> None:
        self._forget(self.stream_id)
        self.sender.close()
        if self._pump is not None:
            self._pump.cancel()
        self._wake()

    def _take(self) -> None:
        self._chunks = []
        if self._due >= self._half and not self._ended:
            self._connection.write(self.stream_id, WINDOW, 0, encode_credit(self._due))
            self._due = 0

    def _next(self) -> asyncio.Future[None]:
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("two tasks read one stream")
        self._waiter = self._create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
