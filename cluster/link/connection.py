"""One end of a link's TCP connection: handshake, batched writes, heartbeat and flow control.

Frames written during one pass of the event loop are sent together by one ``transport.write`` at
the start of the next pass. No timer is involved, and an engine step that feeds many streams costs
one system call. ``client`` and ``server`` subclass ``Connection`` and handle the frames.
"""

import asyncio
import logging
from dataclasses import dataclass
from time import perf_counter
from typing import cast

from cluster.errors import LinkAuthError, LinkClosedError, LinkError, LinkProtocolError
from cluster.link import frames
from cluster.link.frames import (
    CHUNK_BYTES,
    DATA,
    ENTRIES_SIZES,
    JOURNAL,
    LONG_ENTRIES,
    Frame,
    FrameDecoder,
    pack_header,
)
from cluster.link.handshake import PRE_AUTH_BYTES, Handshake

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_PING_TICKS = 4  # ticks from one PING to the next while the peer answers
_MIN_TICKS = 8  # ticks within the shorter of the two silence limits
_WRITE_BUFFER_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Tunables of one end of a link; the two ends may differ."""

    window_bytes: int = 256 * 1024
    """Bytes that the peer may send on one stream before this end has consumed them."""
    silent_after_s: float = 2.0
    """Seconds without any byte, or without an answer to a ping, after which the peer gets no new
    stream: the network may be cut in one direction only.

    Counted in ticks of this end's event loop, so that a stall here does not blame the peer.
    """
    dead_after_s: float = 10.0
    """Seconds of silence after which the connection is closed and its streams fail.

    A process that dies closes its connection at once. Silence means a hang, a lost network or a
    starved event loop: on two cores, the start of another replica can starve this one for seconds.
    Keep this above the longest synchronous call that the peer makes.
    """
    handshake_timeout_s: float = 5.0
    load_interval_s: float = 0.05
    """Minimum seconds between two LOAD frames of a replica."""
    max_streams: int = 16384
    """Maximum of open streams on one link; a replica refuses further ones."""


@dataclass(slots=True)
class LinkCounts:
    """Traffic of one end of a link since it was created: headers and payloads, without TLS."""

    connects: int = 0
    frames_sent: int = 0
    bytes_sent: int = 0
    frames_received: int = 0
    bytes_received: int = 0


class Signal:
    """Wakes all current waiters; unlike ``asyncio.Event`` it keeps no state."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] | None = None

    async def wait(self) -> None:
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
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One end of one TCP connection.

    ``on_ready`` is called once the peer is authenticated, then ``on_frames`` for arriving frames,
    then ``on_closed`` exactly once, even if ``on_ready`` never was. Consecutive connections may
    share their counts.
    """

    def __init__(self, handshake: Handshake, options: LinkOptions, counts: LinkCounts) -> None:
        self.options = options
        self.counts = counts
        self.silent = False
        """True while the peer has been silent for at least ``silent_after_s``."""
        self.writable = False
        """False while the transport's buffer is full; ``on_writable`` fires when it has drained."""
        self.on_writable = Signal()
        self.error: LinkError | None = None
        """Reason why the connection ended; None while it is open."""
        self.peer_window_bytes = 0
        self.received_s = 0.0
        """Time of the last read from the socket (``time.perf_counter``)."""
        self.loop = asyncio.get_running_loop()
        self._closed: asyncio.Future[None] = self.loop.create_future()
        self._handshake: Handshake | None = handshake
        self._decoder = FrameDecoder(PRE_AUTH_BYTES)
        self._pre_auth_bytes = 0
        self._unsent: list[bytes | memoryview] = []  # header and payload alternate
        self._data_id = 0  # stream of the last unsent frame if that frame can be added to
        self._data = b"", b""  # entries and body of that frame
        self._pieces: list[tuple[bytes, bytes]] = []  # of that frame once something was added
        self._num_entries_bytes = 0
        self._num_body_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False  # anything received since the last tick
        self._silent_ticks = 0
        self._ping_ticks: int | None = None  # since a PING without a PONG
        self._num_ticks = 0
        self._tick_s = min(_TICK_S, min(options.silent_after_s, options.dead_after_s) / _MIN_TICKS)
        self._silent_at = int(options.silent_after_s / self._tick_s) - 1
        self._dead_at = int(options.dead_after_s / self._tick_s) - 1

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were written and not yet passed to the operating system."""
        buffered = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return sum(map(len, self._unsent)) + buffered

    # -- hooks of the subclasses --

    def on_ready(self) -> None:
        """Handle the end of the handshake."""

    def on_frames(self, batch: list[Frame]) -> None:
        """Handle arriving frames; raising a LinkError closes the connection."""

    def on_closed(self, error: LinkError) -> None:
        """Handle the end of the connection; nothing can be written any more."""

    def on_silent(self, silent: bool) -> None:
        """Handle a change of ``silent``."""

    def on_tick(self) -> None:
        """Do periodic work: every 0.25 s, or more often if the silence limits are short."""

    # -- writing --

    def write(
        self, stream_id: int, kind: int, flags: int = 0, payload: bytes | memoryview = b""
    ) -> None:
        """Queue one frame for the next flush; do nothing once the connection has ended.

        A memoryview must not change until the flush.
        """
        unsent = self._unsent
        if not unsent:
            if self.error is not None:
                return
            self.loop.call_soon(self._flush)
        elif self._pieces:
            self._join_pieces(0)
        unsent.append(pack_header(len(payload), stream_id, kind, flags))
        unsent.append(payload)
        self._data_id = 0

    def write_data(self, stream_id: int, flags: int, entries: bytes, body: bytes) -> None:
        """Queue a DATA frame of a response, or add to the last frame if it is of the same stream.

        Args:
            stream_id: The stream.
            flags: END or 0.
            entries: Entries of the journal, fewer than ``LONG_ENTRIES`` bytes.
            body: Piece of the body, at most ``CHUNK_BYTES``.
        """
        if stream_id == self._data_id and self._add_data(flags, entries, body):
            return
        if entries:
            payload = ENTRIES_SIZES[len(entries)] + entries + body
            self.write(stream_id, DATA, flags | JOURNAL, payload)
        else:
            self.write(stream_id, DATA, flags, body)
        if not flags:
            self._data_id, self._data = stream_id, (entries, body)

    def _add_data(self, flags: int, entries: bytes, body: bytes) -> bool:
        """Add to the last frame; return False if it would become too large."""
        pieces = self._pieces
        if not pieces:
            pieces.append(self._data)
            self._num_entries_bytes, self._num_body_bytes = map(len, self._data)
        self._num_entries_bytes += len(entries)
        self._num_body_bytes += len(body)
        if self._num_entries_bytes >= LONG_ENTRIES or self._num_body_bytes > CHUNK_BYTES:
            return False
        pieces.append((entries, body))
        if flags:
            self._join_pieces(flags)
        return True

    def _join_pieces(self, flags: int) -> None:
        """Complete the last frame, to which pieces were added."""
        parts = [body for _, body in self._pieces]
        if entries := b"".join([entries for entries, _ in self._pieces]):
            flags |= JOURNAL
            parts = [ENTRIES_SIZES[len(entries)], entries, *parts]
        payload = b"".join(parts)
        self._unsent[-2:] = pack_header(len(payload), self._data_id, DATA, flags), payload
        self._pieces.clear()
        self._data_id = 0

    def _flush(self) -> None:
        # While the transport is full the frames stay here; resume_writing flushes them.
        if self._unsent and self.writable and self._transport is not None:
            if self._pieces:
                self._join_pieces(0)
            self._data_id = 0
            data = b"".join(self._unsent)
            self.counts.frames_sent += len(self._unsent) // 2
            self.counts.bytes_sent += len(data)
            self._unsent.clear()
            self._transport.write(data)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = self._handshake is None and self.error is None
        self._flush()
        if self.writable:
            self.on_writable.fire()

    # -- lifecycle --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        assert self._handshake is not None
        self._transport.write(self._handshake.hello())
        self._timer = self.loop.call_later(
            self.options.handshake_timeout_s, self._on_handshake_timeout
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(LinkClosedError(f"the connection was lost: {exc or 'closed by the peer'}"))
        self._closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self.received_s = perf_counter()
        try:
            if self._handshake is None:
                batch = self._decoder.feed(data)
                self.counts.frames_received += len(batch)
                self.counts.bytes_received += len(data)
                self.on_frames(batch)
            else:
                self._continue_handshake(self._handshake, data)
        except LinkError as error:
            self.fail(error)

    def fail(self, error: LinkError) -> None:
        """End the connection at once with this error; only the first call has an effect."""
        if self.error is not None:
            return
        self._end(error)
        if self._transport is not None:
            if self._handshake is None:
                self._transport.abort()
            else:
                self._transport.close()  # the peer can still read the HELLO or the refusal

    async def shut(self, timeout_s: float, reason: str) -> None:
        """End the connection once all written frames are sent, or after the timeout."""
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
        """Wait until the transport is closed; cancelling the wait has no effect on it."""
        await asyncio.wait([self._closed])

    def _end(self, error: LinkError) -> None:
        self.error = error
        self.writable = False
        self._unsent.clear()
        self._pieces.clear()
        self._data_id = 0
        if self._timer is not None:
            self._timer.cancel()
        self.on_closed(error)
        self.on_writable.fire()

    def _continue_handshake(self, handshake: Handshake, data: bytes) -> None:
        assert self._transport is not None
        self._pre_auth_bytes += len(data)
        if self._pre_auth_bytes > PRE_AUTH_BYTES:
            raise LinkProtocolError(f"more than {PRE_AUTH_BYTES} bytes before the handshake")
        batch = self._decoder.feed(data)
        for number, (_, kind, _, payload) in enumerate(batch, 1):
            try:
                self._transport.write(handshake.receive(kind, payload))
            except LinkAuthError:
                self._transport.write(handshake.refusal())
                raise
            if handshake.done:
                self._end_handshake(handshake)
                self.on_frames(batch[number:])
                return

    def _end_handshake(self, handshake: Handshake) -> None:
        self._handshake = None
        self.counts.connects += 1
        self._decoder.max_payload_bytes = frames.MAX_PAYLOAD_BYTES
        self.peer_window_bytes = handshake.peer_window_bytes
        self.writable = True
        assert self._timer is not None
        self._timer.cancel()
        self._tick()
        self.on_ready()
        self._flush()  # sends frames written during the handshake, whose flush did nothing

    def _on_handshake_timeout(self) -> None:
        timeout_s = self.options.handshake_timeout_s
        self.fail(LinkAuthError(f"the peer did not authenticate within {timeout_s} s"))

    def _tick(self) -> None:
        # Counts ticks, not seconds: after a stall the loop reads before it ticks a second time.
        self._silent_ticks = 0 if self._heard else self._silent_ticks + 1
        self._heard = False
        if self._silent_ticks >= self._dead_at:
            self.fail(LinkClosedError(f"the peer was silent for {self.options.dead_after_s} s"))
            return
        is_sent = not self.unsent_bytes  # otherwise the last PING may be behind large bodies
        if self._ping_ticks is not None and is_sent:
            self._ping_ticks += 1
        self._num_ticks += 1
        is_due = self._ping_ticks is None and not self._num_ticks % _PING_TICKS
        if self._silent_ticks % 2 or is_due:
            self.write(0, frames.PING)
            self._ping_ticks = self._ping_ticks or 0
        if self.silent != (max(self._silent_ticks, self._ping_ticks or 0) >= self._silent_at):
            self.silent = not self.silent
            self.on_silent(self.silent)
        self.on_tick()
        self._timer = self.loop.call_later(self._tick_s, self._tick)

    def handle_ping(self, kind: int) -> None:
        """Answer a PING, and note a PONG.

        Raises:
            LinkProtocolError: a frame of another kind, which the peer may not send.
        """
        if kind == frames.PING:
            self.write(0, frames.PONG)
        elif kind == frames.PONG:
            self._ping_ticks = None
        else:
            raise LinkProtocolError(f"the peer may not send frames of kind {kind}")
