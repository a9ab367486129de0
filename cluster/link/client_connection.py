"""The router's end of one connection: gives arriving frames to the streams that are open on it.

Owns those streams until they end. Does not reconnect (``client`` does).
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from cluster.errors import (
    LinkClosedError,
    LinkError,
    LinkProtocolError,
    LinkRefusedError,
    request_error_for,
)
from cluster.link.connection import Connection, LinkCounts, LinkOptions
from cluster.link.frames import (
    BODY,
    CHUNK_BYTES,
    DATA,
    END,
    ERROR,
    GOAWAY,
    LOAD,
    PREFIXES,
    REFUSED,
    REQUEST,
    RESPONSE,
    USAGE,
    WINDOW,
    Frame,
    RequestHead,
    decode_credit,
    decode_head,
    encode_head,
)
from cluster.link.handshake import Handshake
from cluster.link.prefixes import PrefixEvents, decode_prefixes
from cluster.link.stream import Stream
from cluster.load import Load
from cluster.usage import Usage

_MAX_STREAM_ID = 2**32 - 1
FEW_FRAMES = 8
"""So few are taken as they come."""


class Owner(Protocol):
    """Who wants to know what becomes of a connection."""

    def on_connected(self, connection: "ClientConnection") -> None:
        """The replica has proved itself; streams may be opened."""

    def on_loaded(self, load: Load) -> None:
        """The replica said what it has to do."""

    def on_told(self, events: PrefixEvents) -> None:
        """The replica said what changed in its prefix cache."""

    def on_goaway(self) -> None:
        """The replica drains."""

    def on_silent(self, silent: bool) -> None:
        """The replica has fallen silent, or is heard again."""

    def on_lost(self, error: LinkError) -> None:
        """The connection ended after it had been ready."""


class ClientConnection(Connection):
    """A connection and the streams that are open on it, by id."""

    def __init__(
        self, owner: Owner, secret: bytes, options: LinkOptions, counts: LinkCounts
    ) -> None:
        super().__init__(Handshake("client", secret, options.window_bytes), options, counts)
        self.streams: dict[int, Stream] = {}
        self._ready: asyncio.Future[None] = self.loop.create_future()
        self._owner = owner
        self._last_id = 0
        self._num_prefixes = 0

    async def wait_ready(self) -> None:
        """Return once the peer has proved itself, or ``error`` says why it did not."""
        await asyncio.wait([self._ready])

    def open(self, head: RequestHead, body: bytes | AsyncIterator[bytes]) -> Stream:
        """Send a request on a new stream."""
        stream_id = self._next_id()
        stream = Stream(self, stream_id, self._forget)
        self.streams[stream_id] = stream
        self.write(stream_id, REQUEST, 0 if body else END, encode_head(head))
        if isinstance(body, bytes) and len(body) <= CHUNK_BYTES:
            if body:
                stream.sender.credit -= len(body)
                self.write(stream_id, BODY, END, body)
        else:
            stream.pump(body)
        return stream

    def on_ready(self) -> None:
        """The replica has proved itself."""
        self._ready.set_result(None)
        self._owner.on_connected(self)

    def on_frames(self, frames: list[Frame]) -> None:
        """Answers that begin go first: they wait behind one token of each stream otherwise."""
        if len(frames) > FEW_FRAMES and (new := {f[0] for f in frames if f[1] == RESPONSE}):
            self._take([frame for frame in frames if frame[0] in new])
            frames = [frame for frame in frames if frame[0] not in new]
        self._take(frames)

    def _take(self, frames: list[Frame]) -> None:
        """The hot path: DATA goes straight to its stream."""
        streams = self.streams
        for stream_id, kind, flags, payload in frames:
            if kind == DATA:
                stream = streams.get(stream_id)
                if stream is not None:
                    stream.on_data(flags, payload)
            else:
                self._on_frame(stream_id, kind, flags, payload)

    def on_silent(self, silent: bool) -> None:
        """The replica has fallen silent, or is heard again."""
        self._owner.on_silent(silent)

    def on_closed(self, error: LinkError) -> None:
        """Fail every open stream."""
        if not self._ready.done():
            self._ready.set_result(None)
            return
        for stream in list(self.streams.values()):
            stream.fail(LinkClosedError(str(error)))
        self._owner.on_lost(error)

    def _on_frame(self, stream_id: int, kind: int, flags: int, payload: bytes) -> None:
        if kind == LOAD:
            self._owner.on_loaded(decode_head(payload, Load))
        elif kind == PREFIXES:
            self._on_prefixes(payload)
        elif kind == GOAWAY:
            self._owner.on_goaway()
        elif kind not in (RESPONSE, WINDOW, ERROR, USAGE):
            self.answer(kind)
        elif (stream := self.streams.get(stream_id)) is None:
            return  # it ended, or was cancelled, while the frame was on its way
        elif kind == RESPONSE:
            stream.on_response(payload)
        elif kind == WINDOW:
            stream.sender.grant(decode_credit(payload))
        elif kind == USAGE:
            stream.usage = decode_head(payload, Usage)
        else:
            stream.fail(_stream_error(flags, payload))

    def _on_prefixes(self, payload: bytes) -> None:
        number, events = decode_prefixes(payload)
        if number != self._num_prefixes or (number == 0 and not events.cleared):
            raise LinkProtocolError(f"PREFIXES {number} instead of {self._num_prefixes}")
        self._num_prefixes += 1
        self._owner.on_told(events)

    def _forget(self, stream_id: int) -> None:
        self.streams.pop(stream_id, None)

    def _next_id(self) -> int:
        self._last_id = self._last_id % _MAX_STREAM_ID + 1
        while self._last_id in self.streams:
            self._last_id = self._last_id % _MAX_STREAM_ID + 1
        return self._last_id


def _stream_error(flags: int, payload: bytes) -> Exception:
    status, message = decode_head(payload, tuple[int, str])
    if flags & REFUSED:
        return LinkRefusedError(message)
    return request_error_for(status, message)
