"""Flow control of one stream: the credit that a sender has, and waiting for it.

Owns no bytes. A slow consumer holds back its own stream alone, because each stream has its own
credit; a slow connection holds back all, because the transport says so.
"""

import asyncio
from typing import TYPE_CHECKING

from cluster.errors import LinkClosedError
from cluster.link.frames import CHUNK_BYTES, END

if TYPE_CHECKING:
    from cluster.link.connection import Connection


class Signal:
    """Wakes everyone who waits now; unlike an Event it has no state of its own."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] | None = None

    async def wait(self) -> None:
        """Return at the next ``fire``."""
        waiter = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if self._waiters is not None and waiter in self._waiters:
                self._waiters.remove(waiter)

    def fire(self) -> None:
        """Wake those who wait."""
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)


class SendSide:
    """The sending half of one stream.

    ``credit`` is what the peer may still be sent, in bytes; the last frame may overdraw it.
    """

    __slots__ = ("_granted", "connection", "credit", "open", "stream_id")

    def __init__(self, connection: "Connection", stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.credit = connection.peer_window_bytes
        self.open = True
        self._granted = Signal()

    def grant(self, credit_bytes: int) -> None:
        """The peer's consumer has read so much."""
        self.credit += credit_bytes
        self._granted.fire()

    def close(self) -> None:
        """Nothing is to be sent any more; wakes those who wait to send."""
        self.open = False
        self._granted.fire()

    async def send(self, kind: int, payload: bytes, end: bool) -> None:
        """Send a payload of any size in pieces, as credit and transport allow.

        Raises:
            LinkClosedError: the stream ended meanwhile.
        """
        view = memoryview(payload)
        start, size = 0, len(payload)
        while True:
            await self.ready()
            piece = view[start : start + CHUNK_BYTES]
            start += CHUNK_BYTES
            last = start >= size
            self.credit -= len(piece)
            self.connection.write(self.stream_id, kind, END if last and end else 0, piece)
            if last:
                return
            await asyncio.sleep(0)  # other streams' frames come between two pieces

    async def ready(self) -> None:
        """Return when a frame may be sent; LinkClosedError if the stream ended."""
        while self.open:
            if self.credit <= 0:
                await self._granted.wait()
            elif not self.connection.writable:
                await self.connection.on_writable.wait()
                if self.connection.error is not None:
                    self.open = False
            else:
                return
        raise LinkClosedError("the stream ended")
