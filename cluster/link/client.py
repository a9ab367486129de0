"""The router's end of a link: one connection to one replica, kept open, with streams on it.

``LinkClient`` connects and reconnects; ``ClientConnection`` is one of its connections and passes
arriving frames to the streams. Choosing a replica is not done here.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from enum import Enum
from ssl import SSLContext
from typing import TypeVar

from cluster.errors import (
    HeadersTooLargeError,
    LinkAuthError,
    LinkClosedError,
    LinkError,
    LinkProtocolError,
    LinkRefusedError,
    request_error_for,
)
from cluster.link import frames
from cluster.link.client_stream import ClientStream
from cluster.link.connection import Connection, LinkCounts, LinkOptions, Signal
from cluster.link.frames import (
    DATA,
    END,
    RESPONSE,
    Adapters,
    AnswerEvents,
    Frame,
    PrefixEvents,
    RequestHead,
    decode_head,
)
from cluster.link.handshake import Handshake
from cluster.load import Load
from cluster.usage import Usage

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_MIN_S = 0.05
_BACKOFF_MAX_S = 2.0
_MAX_STREAM_ID = 2**32 - 1
# Wait for the usage of a cancelled stream, whose slot is held until then. A busy engine may need
# seconds to stop. Older replicas do not report it, so the long wait needs a first report.
_REPORT_TIMEOUT_S = 10.0
_FIRST_REPORT_TIMEOUT_S = 2.0
_MAX_UNSORTED_FRAMES = 8  # batches of more frames are sorted; see ClientConnection.on_frames


class LinkState(Enum):
    """State of a link; new streams can be opened only while it is CONNECTED."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    SILENT = "silent"
    """Connected, but nothing has been received for ``silent_after_s``."""
    DRAINING = "draining"
    """The replica finishes its open streams and takes no new one."""
    CLOSED = "closed"


class LinkClient:
    """A link to the replica at one address.

    The callbacks run on the event loop: ``on_state`` after ``state`` or ``failures`` changed,
    ``on_load`` after ``load`` changed, ``on_prefixes`` with changes of the replica's prefix cache.
    ``on_prefixes`` must be set before ``start``; each connection starts with a snapshot. So must
    ``on_answers``, with changes of the answers that the replica keeps, and ``on_adapters``, with
    its LoRA adapters.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        *,
        ssl: SSLContext | None = None,
        options: LinkOptions | None = None,
        counts: LinkCounts | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.state = LinkState.CONNECTING
        self.load: Load | None = None
        """Last load that the replica reported on this connection."""
        self.last_error: LinkError | None = None
        """Reason why the last attempt or connection ended; None while connected."""
        self.failures = 0
        """Failed attempts since the last connection."""
        self.counts = counts or LinkCounts()
        """Traffic; several links may share one object."""
        self.on_state: Callable[[LinkState], None] | None = None
        self.on_load: Callable[[Load], None] | None = None
        self.on_prefixes: Callable[[PrefixEvents], None] | None = None
        self.on_answers: Callable[[AnswerEvents], None] | None = None
        self.on_adapters: Callable[[Adapters], None] | None = None
        self._secret = secret
        self._ssl = ssl
        self._options = options or LinkOptions()
        self._connection: ClientConnection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._attempt_ended = Signal()
        self._uploads: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return self.state is LinkState.CONNECTED

    @property
    def num_open(self) -> int:
        return len(self._connection.streams) if self._connection else 0

    def start(self) -> None:
        """Connect in the background, and reconnect until ``close``."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def connect(self, timeout_s: float = 5.0) -> None:
        """Start, and wait for the first connection; call ``close`` even if this raises.

        Raises:
            LinkAuthError, LinkProtocolError: the peer is no replica of this cluster.
            LinkClosedError: no connection within the timeout; attempts go on in the background.
        """
        self.start()
        try:
            async with asyncio.timeout(timeout_s):
                while not self.connected:
                    if isinstance(self.last_error, LinkAuthError | LinkProtocolError):
                        raise self.last_error
                    if self.state is LinkState.CLOSED:
                        raise LinkClosedError("the link was closed")
                    await self._attempt_ended.wait()
        except TimeoutError:
            raise LinkClosedError(
                f"no link to {self.host}:{self.port} within {timeout_s} s: {self.last_error}"
            ) from None

    def open(self, head: RequestHead, body: bytes | AsyncIterator[bytes] = b"") -> ClientStream:
        """Send a request without waiting.

        Raises:
            LinkRefusedError: not connected, or the replica drains.
            HeadersTooLargeError: the head does not fit a frame.
        """
        if self._connection is None or not self.connected:
            raise LinkRefusedError(f"the link to {self.host}:{self.port} is {self.state.value}")
        return self._connection.open(head, body)

    def new_connection(self) -> "ClientConnection":
        return ClientConnection(self, self._secret, self._options, self.counts)

    def start_upload(self, stream: ClientStream, body: bytes | AsyncIterator[bytes]) -> None:
        """Send the body of a stream in a task that ``close`` waits for."""
        upload = stream.start_upload(body)
        self._uploads.add(upload)
        upload.add_done_callback(self._uploads.discard)

    async def close(self) -> None:
        """End the connection; open streams fail with LinkClosedError. Safe to call twice."""
        self._set_state(LinkState.CLOSED)
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        if self._uploads:
            await asyncio.wait(self._uploads)

    # -- for the connection --

    def handle_ready(self, connection: "ClientConnection") -> None:
        self._connection = connection
        if self.on_prefixes is not None:
            connection.write(0, frames.PREFIXES)
        if self.on_answers is not None:
            connection.write(0, frames.ANSWERS)
        if self.on_adapters is not None:
            connection.write(0, frames.ADAPTERS)
        self.last_error = None
        self.failures = 0
        self._set_state(LinkState.CONNECTED)
        self._attempt_ended.fire()

    def handle_load(self, load: Load) -> None:
        self.load = load
        self._notify(self.on_load, load)

    def handle_prefixes(self, events: PrefixEvents) -> None:
        self._notify(self.on_prefixes, events)

    def handle_answers(self, events: AnswerEvents) -> None:
        self._notify(self.on_answers, events)

    def handle_adapters(self, adapters: Adapters) -> None:
        self._notify(self.on_adapters, adapters)

    def handle_silence(self, silent: bool) -> None:
        if self.state is not LinkState.DRAINING:
            self._set_state(LinkState.SILENT if silent else LinkState.CONNECTED)

    def handle_goaway(self) -> None:
        self._set_state(LinkState.DRAINING)

    def handle_lost(self, error: LinkError) -> None:
        self._connection = None
        self.load = None
        self.last_error = error
        self._set_state(LinkState.CONNECTING)

    # -- internals --

    def _set_state(self, state: LinkState) -> None:
        if state is self.state or self.state is LinkState.CLOSED:
            return
        self.state = state
        self._notify(self.on_state, state)

    def _notify(self, callback: Callable[[T], None] | None, value: T) -> None:
        try:
            if callback is not None:
                callback(value)
        except Exception:  # an error in a callback must not end the link
            logger.exception("a callback of the link to %s:%d failed", self.host, self.port)

    async def _run(self) -> None:
        try:
            while True:
                if not await self._connect_once():
                    self.failures += 1
                    self._notify(self.on_state, self.state)
                max_s = min(_BACKOFF_MAX_S, _BACKOFF_MIN_S * 2 ** min(self.failures + 1, 10))
                await asyncio.sleep(random.uniform(_BACKOFF_MIN_S, max_s))
        finally:
            self._attempt_ended.fire()

    async def _connect_once(self) -> bool:
        """Connect and wait for the end of the connection; return False if it failed."""
        connection: ClientConnection | None = None
        try:
            async with asyncio.timeout(self._options.handshake_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    self.new_connection, self.host, self.port, ssl=self._ssl
                )
            await connection.wait_ready()
            if connection.error is None:
                await connection.wait_closed()
                return True
            self._record_failure(connection.error)
        except (OSError, ValueError) as error:  # ValueError: an invalid host name
            self._record_failure(LinkClosedError(f"cannot reach {self.host}:{self.port}: {error}"))
        except Exception as error:  # a defect must not end the attempts
            logger.exception("the link to %s:%d failed", self.host, self.port)
            self._record_failure(LinkClosedError(f"defect in the link: {error!r}"))
        finally:
            if connection is not None:
                connection.fail(LinkClosedError("the link was closed"))
                await connection.wait_closed()
        return False

    def _record_failure(self, error: LinkError) -> None:
        if not self.failures or type(error) is not type(self.last_error):
            logger.warning("link to %s:%d: %s", self.host, self.port, error)
        self.last_error = error
        self._attempt_ended.fire()


class ClientConnection(Connection):
    """One connection of a ``LinkClient`` and its open streams by id."""

    def __init__(
        self, link: LinkClient, secret: bytes, options: LinkOptions, counts: LinkCounts
    ) -> None:
        super().__init__(Handshake("client", secret, options.window_bytes), options, counts)
        self.streams: dict[int, ClientStream] = {}
        # Cancelled streams whose usage the replica has yet to report, and when that is given up.
        self._reporting: dict[int, tuple[ClientStream, asyncio.TimerHandle]] = {}
        self._has_reported = False  # True once the replica has reported such a usage
        self._ready: asyncio.Future[None] = self.loop.create_future()
        self._link = link
        self._last_id = 0
        self._num_prefixes = 0  # PREFIXES frames received

    async def wait_ready(self) -> None:
        """Return once the peer has authenticated, or once ``error`` is set."""
        await asyncio.wait([self._ready])

    def open(self, head: RequestHead, body: bytes | AsyncIterator[bytes]) -> ClientStream:
        payload = frames.encode_head(head)  # first, because it can raise
        if len(payload) > frames.MAX_PAYLOAD_BYTES:  # the peer would end the connection
            raise HeadersTooLargeError(
                f"The headers of the request are {len(payload)} bytes; the limit between router "
                f"and replica is {frames.MAX_PAYLOAD_BYTES} bytes."
            )
        stream_id = self._next_id()
        stream = ClientStream(self, stream_id, self._remove_stream)
        self.streams[stream_id] = stream
        self.write(stream_id, frames.REQUEST, 0 if body else END, payload)
        if isinstance(body, bytes) and len(body) <= frames.CHUNK_BYTES:
            if body:
                stream.sender.credit -= len(body)
                self.write(stream_id, frames.BODY, END, body)
        else:
            self._link.start_upload(stream, body)
        return stream

    def on_ready(self) -> None:
        self._ready.set_result(None)
        self._link.handle_ready(self)

    def on_frames(self, batch: list[Frame]) -> None:
        """Handle frames; in large batches the streams whose response starts come first.

        Otherwise a first token would wait for the handling of one token of every other stream.
        """
        if len(batch) > _MAX_UNSORTED_FRAMES and (
            starting := {frame[0] for frame in batch if frame[1] == RESPONSE}
        ):
            self._dispatch([frame for frame in batch if frame[0] in starting])
            batch = [frame for frame in batch if frame[0] not in starting]
        self._dispatch(batch)

    def _dispatch(self, batch: list[Frame]) -> None:
        # Hot path: once for each token.
        streams = self.streams
        for stream_id, kind, flags, payload in batch:
            if kind == DATA:
                stream = streams.get(stream_id)
                if stream is not None:
                    stream.on_data(flags, payload)
                elif flags & END:
                    self._end_report(stream_id)
            else:
                self._on_frame(stream_id, kind, flags, payload)

    def on_silent(self, silent: bool) -> None:
        self._link.handle_silence(silent)

    def on_closed(self, error: LinkError) -> None:
        if not self._ready.done():
            self._ready.set_result(None)
            return
        # First, because a failed stream releases its slot, which queued requests take at once.
        self._link.handle_lost(error)
        for stream in list(self.streams.values()):
            stream.fail(LinkClosedError(str(error)))
        for stream_id in list(self._reporting):
            self._end_report(stream_id)

    def _on_frame(self, stream_id: int, kind: int, flags: int, payload: bytes) -> None:
        if kind == frames.LOAD:
            self._link.handle_load(decode_head(payload, Load))
        elif kind == frames.PREFIXES:
            self._on_prefixes(payload)
        elif kind == frames.ANSWERS:
            self._link.handle_answers(frames.decode_answers(payload))
        elif kind == frames.ADAPTERS:
            self._link.handle_adapters(decode_head(payload, Adapters))
        elif kind == frames.GOAWAY:
            self._link.handle_goaway()
        elif kind not in (RESPONSE, frames.WINDOW, frames.ERROR, frames.USAGE):
            self.handle_ping(kind)
        elif (stream := self.streams.get(stream_id)) is None:
            # The stream ended or was cancelled while the frame was in transit.
            if kind == frames.ERROR:
                self._end_report(stream_id)
            elif kind == frames.USAGE:
                self._has_reported = True
                if (report := self._reporting.get(stream_id)) is not None:
                    report[0].usage = decode_head(payload, Usage)
        elif kind == RESPONSE:
            stream.on_response(payload)
        elif kind == frames.WINDOW:
            stream.sender.add_credit(frames.decode_credit(payload))
        elif kind == frames.USAGE:
            stream.usage = decode_head(payload, Usage)
        else:
            stream.fail(_stream_error(flags, payload))

    def _on_prefixes(self, payload: bytes) -> None:
        number, events = frames.decode_prefixes(payload)
        if number != self._num_prefixes or (number == 0 and not events.cleared):
            raise LinkProtocolError(f"PREFIXES frame {number} instead of {self._num_prefixes}")
        self._num_prefixes += 1
        self._link.handle_prefixes(events)

    def _remove_stream(self, stream: ClientStream, reports: bool) -> None:
        self.streams.pop(stream.stream_id, None)
        if reports:
            timeout_s = _REPORT_TIMEOUT_S if self._has_reported else _FIRST_REPORT_TIMEOUT_S
            timer = self.loop.call_later(timeout_s, self._end_report, stream.stream_id)
            self._reporting[stream.stream_id] = stream, timer

    def _end_report(self, stream_id: int) -> None:
        if (report := self._reporting.pop(stream_id, None)) is not None:
            stream, timer = report
            timer.cancel()  # it would keep a closed connection
            stream.finish()

    def _next_id(self) -> int:
        self._last_id = self._last_id % _MAX_STREAM_ID + 1
        while self._last_id in self.streams or self._last_id in self._reporting:
            self._last_id = self._last_id % _MAX_STREAM_ID + 1
        return self._last_id


def _stream_error(flags: int, payload: bytes) -> Exception:
    status, message = decode_head(payload, tuple[int, str])
    if flags & frames.REFUSED:
        return LinkRefusedError(message)
    return request_error_for(status, message)
