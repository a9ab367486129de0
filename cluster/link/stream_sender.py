"""Sending half of one stream of a link, with its flow control."""

import asyncio

from cluster.errors import LinkClosedError
from cluster.link.connection import Connection, Signal
from cluster.link.frames import CHUNK_BYTES, END


class StreamSender:
    """Sending half of one stream, with its flow control.

    A slow consumer holds back only its own stream, because each stream has its own credit; a slow
    connection holds back all streams. ``credit`` is the number of bytes that may still be sent;
    the last frame may overdraw it.
    """

    __slots__ = ("_credit_added", "connection", "credit", "open", "stream_id")

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.credit = connection.peer_window_bytes
        self.open = True
        self._credit_added = Signal()

    def add_credit(self, credit_bytes: int) -> None:
        self.credit += credit_bytes
        self._credit_added.fire()

    def close(self) -> None:
        """Send nothing more and wake waiting senders."""
        self.open = False
        self._credit_added.fire()

    async def send(self, kind: int, payload: bytes, end: bool) -> None:
        """Send a payload of any size in pieces, as credit and transport allow.

        Raises:
            LinkClosedError: the stream ended meanwhile.
        """
        view = memoryview(payload)
        start, size = 0, len(payload)
        while True:
            await self.wait_ready()
            piece = view[start : start + CHUNK_BYTES]
            start += CHUNK_BYTES
            last = start >= size
            self.credit -= len(piece)
            self.connection.write(self.stream_id, kind, END if last and end else 0, piece)
            if last:
                return
            await asyncio.sleep(0)  # let other streams write between two pieces

    async def wait_ready(self) -> None:
        """Wait until a frame may be sent.

        Raises:
            LinkClosedError: the stream ended meanwhile.
        """
        while self.open:
            if self.credit <= 0:
                await self._credit_added.wait()
            elif not self.connection.writable:
                await self.connection.on_writable.wait()
                if self.connection.error is not None:
                    self.open = False
            else:
                return
        raise LinkClosedError("the stream ended")
