"""What both ends of a link share: one TCP connection, its handshake, its flushes, its heartbeat.

Frames that are written during one pass of the event loop leave in one ``transport.write`` at the
start of the next: no timer, and a step of an engine that feeds many streams costs one system
call. Owns the transport and the unsent frames. Does not know requests; ``client`` and ``server``
give the frames a meaning.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

from cluster.errors import LinkAuthError, LinkClosedError, LinkError, LinkProtocolError
from cluster.link.flow import Signal
from cluster.link.frames import MAX_PAYLOAD_BYTES, PING, PONG, Decoder, Frame, pack_header
from cluster.link.handshake import PRE_AUTH_BYTES, Handshake

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_TICKS_MIN = 8
_WRITE_BUFFER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """The link's constants; both ends may have their own."""

    window_bytes: int = 256 * 1024
    """What the peer may send on one stream before this end's consumer has read it."""
    silent_after_s: float = 2.0
    """A peer that sent nothing for so long, not even an answer to a ping, gets nothing new.

    Counted in ticks of this end's loop, so a stall here (an import, a collection) blames nobody.
    """
    dead_after_s: float = 10.0
    """A peer that was silent for so long is dead, and what it was doing is lost.

    A process that dies shows at once as the end of its connection. Silence means a hang or a lost
    network, or just an event loop that starved: on two cores, another replica's start can take
    both for seconds. Set it above the longest synchronous call that the peer makes.
    """
    handshake_timeout_s: float = 5.0
    load_interval_s: float = 0.05
    """A replica says its load at most this often."""
    max_streams: int = 16384
    """Streams that a replica serves at a time on one link; further ones are refused."""


@dataclass(slots=True)
class LinkCounts:
    """What passed on one end of a link since its beginning; heads and payloads, not TLS."""

    connects: int = 0
    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0


class Connection(asyncio.Protocol):
    """One end of one TCP connection.

    ``on_ready`` is called once the peer has proved itself, then ``on_frames`` with what arrives,
    then ``on_closed`` exactly once, also where ``on_ready`` never was.

    Args:
        handshake: This end's part of it.
        options: The link's constants.
        counts: Where this end counts what passes; it may be that of earlier connections.
    """

    def __init__(self, handshake: Handshake, options: LinkOptions, counts: LinkCounts) -> None:
        self.options = options
        self.counts = counts
        self.silent = False
        """Whether the peer has been silent for ``silent_after_s``."""
        self.writable = False
        """False while the transport holds more than it should; ``on_writable`` says when not."""
        self.on_writable = Signal()
        self.error: LinkError | None = None
        """Why the connection ended; None while it lives."""
        self.peer_window_bytes = 0
        self.loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[None] = self.loop.create_future()
        self._handshake: Handshake | None = handshake
        self._decoder = Decoder(PRE_AUTH_BYTES)
        self._early_bytes = 0
        self._out: list[bytes | memoryview] = []
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._silent_ticks = 0
        self._tick_s = min(_TICK_S, min(options.silent_after_s, options.dead_after_s) / _TICKS_MIN)
        self._silent_at = int(options.silent_after_s / self._tick_s) - 1
        self._dead_at = int(options.dead_after_s / self._tick_s) - 1

    # -- for the two ends to fill in --

    def on_ready(self) -> None:
        """The peer has proved itself."""

    def on_frames(self, frames: list[Frame]) -> None:
        """Frames arrived; a LinkError raised here ends the connection."""

    def on_closed(self, error: LinkError) -> None:
        """The connection ended; nothing can be written any more."""

    def on_silent(self, silent: bool) -> None:
        """The peer has fallen silent, or is heard again."""

    def on_tick(self) -> None:
        """Called every quarter of a second, or more often where ``dead_after_s`` is short."""

    # -- writing --

    def write(
        self, stream_id: int, kind: int, flags: int = 0, payload: bytes | memoryview = b""
    ) -> None:
        """Queue one frame for the next flush; after the end this does nothing.

        A memoryview must not change until the flush.
        """
        out = self._out
        if not out:
            if self.error is not None:
                return
            self.loop.call_soon(self._flush)
        out.append(pack_header(len(payload), stream_id, kind, flags))
        out.append(payload)

    def _flush(self) -> None:
        # While the transport is full the frames stay here; resume_writing comes back for them.
        if self._out and self.writable and self._transport is not None:
            data = b"".join(self._out)
            self.counts.frames_sent += len(self._out) // 2
            self.counts.bytes_sent += len(data)
            self._out.clear()
            self._transport.write(data)

    def pause_writing(self) -> None:
        """The transport is full."""
        self.writable = False

    def resume_writing(self) -> None:
        """The transport has room again."""
        self.writable = self._handshake is None and self.error is None
        self._flush()
        if self.writable:
            self.on_writable.fire()

    # -- the connection's life --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        assert self._handshake is not None
        self._transport.write(self._handshake.hello())
        self._timer = self.loop.call_later(self.options.handshake_timeout_s, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The TCP connection is gone."""
        self.fail(LinkClosedError(f"the connection was lost: {exc or 'closed by the peer'}"))
        self._closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._heard = True
        try:
            if self._handshake is None:
                frames = self._decoder.feed(data)
                self.counts.frames_received += len(frames)
                self.counts.bytes_received += len(data)
                self.on_frames(frames)
            else:
                self._shake(self._handshake, data)
        except LinkError as error:
            self.fail(error)

    def fail(self, error: LinkError) -> None:
        """End the connection now, for this reason; only the first call counts."""
        if self.error is not None:
            return
        self._end(error)
        if self._transport is not None:
            if self._handshake is None:
                self._transport.abort()
            else:
                self._transport.close()  # lets the peer read why: HELLO, or the refusal

    async def shut(self, timeout_s: float, reason: str) -> None:
        """End the connection once what was written has left, or after the timeout."""
        if self.error is None and self._transport is not None:
            self.writable = True
            self._flush()
            self._end(LinkClosedError(reason))
            self._transport.close()
        await asyncio.wait([self._closed], timeout=timeout_s)
        if self._transport is not None and not self._closed.done():
            self._transport.abort()
            await self.wait_closed()

    async def wait_closed(self) -> None:
        """Return when the transport is gone; cancelling this leaves the connection alone."""
        await asyncio.wait([self._closed])

    def _end(self, error: LinkError) -> None:
        self.error = error
        self.writable = False
        self._out.clear()
        if self._timer is not None:
            self._timer.cancel()
        self.on_closed(error)
        self.on_writable.fire()

    def _shake(self, handshake: Handshake, data: bytes) -> None:
        assert self._transport is not None
        self._early_bytes += len(data)
        if self._early_bytes > PRE_AUTH_BYTES:
            raise LinkProtocolError(f"more than {PRE_AUTH_BYTES} bytes before the handshake")
        frames = self._decoder.feed(data)
        for number, (_, kind, _, payload) in enumerate(frames, 1):
            try:
                self._transport.write(handshake.receive(kind, payload))
            except LinkAuthError:
                self._transport.write(handshake.refusal())
                raise
            if handshake.done:
                self._start(handshake)
                self.on_frames(frames[number:])
                return

    def _start(self, handshake: Handshake) -> None:
        self._handshake = None
        self.counts.connects += 1
        self._decoder.max_payload_bytes = MAX_PAYLOAD_BYTES
        self.peer_window_bytes = handshake.peer_window_bytes
        self.writable = True
        assert self._timer is not None
        self._timer.cancel()
        self._tick()
        self.on_ready()
        self._flush()  # what was written before had no flush that could send it

    def _too_late(self) -> None:
        timeout_s = self.options.handshake_timeout_s
        self.fail(LinkAuthError(f"the peer did not prove itself within {timeout_s} s"))

    def _tick(self) -> None:
        # Ticks count, not seconds: a loop that stalled ticks once and reads before it judges.
        self._silent_ticks = 0 if self._heard else self._silent_ticks + 1
        self._heard = False
        if self._silent_ticks >= self._dead_at:
            self.fail(LinkClosedError(f"no answer for {self.options.dead_after_s} s"))
            return
        if self._silent_ticks % 2:
            self.write(0, PING)
        if self.silent != (self._silent_ticks >= self._silent_at):
            self.silent = not self.silent
            self.on_silent(self.silent)
        self.on_tick()
        self._timer = self.loop.call_later(self._tick_s, self._tick)

    def answer(self, kind: int) -> None:
        """Handle a frame that both ends treat alike, PING or PONG; refuse any other."""
        if kind == PING:
            self.write(0, PONG)
        elif kind != PONG:
            raise LinkProtocolError(f"the peer must not send frames of kind {kind} now")
