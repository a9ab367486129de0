"""The replica's end of a link: answers the streams of all routers with one ASGI application.

Owns the listening socket, the connections and one task for each stream.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from ssl import SSLContext
from typing import NamedTuple, Protocol

import msgspec

from cluster.asgi import ASGIApp, Scope
from cluster.errors import LinkAuthError, LinkError, LinkProtocolError
from cluster.link import frames
from cluster.link.answer_store import AnswerStore
from cluster.link.connection import Connection, LinkCounts, LinkOptions
from cluster.link.frames import (
    END,
    Adapters,
    Frame,
    PrefixEvents,
    RequestHead,
    decode_head,
    encode_head,
)
from cluster.link.handshake import Handshake
from cluster.link.server_stream import ServerStream
from cluster.load import Load

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 1.0
PREFIXES_INTERVAL_S = 0.02
"""Seconds for which changes of the prefix cache are collected before they are sent."""


class PrefixSource(Protocol):
    """A replica's prefix cache as the server sees it; on one event loop and never blocking."""

    on_change: Callable[[], None] | None
    """Called when there is something to take; set by the server."""

    def take_events(self) -> PrefixEvents | None:
        """Return the changes since the last call; None if there are no changes."""

    def snapshot(self) -> Sequence[int]:
        """Return all cached hashes, including those not yet returned by ``take_events``."""


class DrainResult(NamedTuple):
    """Outcome of the streams that were open when a drain began."""

    finished: int
    cancelled: int


class LinkServer:
    """Serves an application to every router that knows the secret.

    Port 0 picks a free one. ``load`` returns the engine's load and must not block; ``prefixes`` is
    the engine's prefix cache and must not be used elsewhere. ``resumes`` is True if the application
    keeps journals and continues the answers of other replicas; if not, a peer cannot ask for that.
    ``answers`` keeps the answers to requests with a key; None: keys have no effect.
    """

    def __init__(
        self,
        app: ASGIApp,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl: SSLContext | None = None,
        load: Callable[[], Load] | None = None,
        prefixes: PrefixSource | None = None,
        resumes: bool = False,
        answers: AnswerStore | None = None,
        options: LinkOptions | None = None,
    ) -> None:
        self.app = app
        self.address = (host, port)
        """Host and port; the port is the actual one after ``start``."""
        self.resumes = resumes
        self.is_draining = False
        self.counts = LinkCounts()
        """Traffic of all connections."""
        self._secret = secret
        self._load = load
        self.answers = answers
        self.adapters = Adapters()
        """LoRA adapters of the application; see ``set_adapters``."""
        self._prefixes = prefixes
        self._prefixes_timer: asyncio.TimerHandle | None = None
        self._ssl = ssl
        self._options = options or LinkOptions()
        self._server: asyncio.Server | None = None
        self.connections: set[ServerConnection] = set()
        """Open connections, unauthenticated ones included."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> tuple[str, int]:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self.new_connection,
            *self.address,
            ssl=self._ssl,
            ssl_handshake_timeout=self._options.handshake_timeout_s if self._ssl else None,
            backlog=1024,
        )
        self.address = self._server.sockets[0].getsockname()[:2]
        if self._prefixes is not None:
            self._prefixes.take_events()  # no subscriber has missed them
            self._prefixes.on_change = self._schedule_prefixes
        if self.answers is not None:
            self.answers.on_change = self._send_answers
        return self.address

    def set_adapters(self, adapters: Adapters) -> None:
        """Tell the routers which adapters the application has."""
        if adapters != self.adapters:
            self.adapters = adapters
            for connection in self.connections:
                connection.send_adapters()

    @property
    def num_streams(self) -> int:
        """Streams whose application has not returned."""
        return len(self._tasks)

    def current_load(self) -> Load:
        engine: Load = self._load() if self._load is not None else Load()
        return msgspec.structs.replace(engine, in_flight=self.num_streams)

    def retire(self) -> None:
        """Refuse new streams; open streams and the connections stay.

        A closed port would look like a failure; a GOAWAY makes routers use other replicas.
        """
        self.is_draining = True
        for connection in self.connections:
            connection.write(0, frames.GOAWAY)
        if self.answers is not None:
            self.answers.retire()

    async def finish(self, timeout_s: float) -> DrainResult:
        """Refuse new streams, wait for the open ones and cancel the rest; the connections stay.

        A cancelled stream ends with an error (503) on the router's side.
        """
        self.retire()
        tasks, unfinished = set(self._tasks), set[asyncio.Task[None]]()
        if tasks:
            _, unfinished = await asyncio.wait(tasks, timeout=timeout_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=_CLOSE_TIMEOUT_S)
        if self.answers is not None:
            await self.answers.close(_CLOSE_TIMEOUT_S)
        return DrainResult(finished=len(tasks) - len(unfinished), cancelled=len(unfinished))

    async def drain(self, timeout_s: float) -> DrainResult:
        """Finish as ``finish`` does, accept no connections meanwhile, then close all."""
        if self._server is not None:
            self._server.close()
        if self._prefixes is not None:
            self._prefixes.on_change = None
        if self._prefixes_timer is not None:
            self._prefixes_timer.cancel()
        result = await self.finish(timeout_s)
        closing = [c.shut(_CLOSE_TIMEOUT_S, "the replica stopped") for c in self.connections]
        await asyncio.gather(*closing)
        if self._server is not None:
            await self._server.wait_closed()
        return result

    async def stop(self) -> None:
        await self.drain(0)

    # -- for the connections --

    def new_connection(self) -> "ServerConnection":
        return ServerConnection(self, self._secret, self._options)

    def run_app(self, stream: ServerStream, client: tuple[str, int]) -> asyncio.Task[None]:
        scope = stream.scope(self.address, client)
        task = asyncio.get_running_loop().create_task(self._answer(stream, scope))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def prefix_snapshot(self) -> PrefixEvents | None:
        if self._prefixes is None:
            return None
        return PrefixEvents(stored=self._prefixes.snapshot(), cleared=True)

    def send_prefixes(self) -> None:
        self._prefixes_timer = None
        events = self._prefixes.take_events() if self._prefixes is not None else None
        if events is not None:
            pieces = list(frames.split_events(events))
            for connection in self.connections:
                connection.send_prefixes(pieces)

    def _schedule_prefixes(self) -> None:
        if self._prefixes_timer is None:
            loop = asyncio.get_running_loop()
            self._prefixes_timer = loop.call_later(PREFIXES_INTERVAL_S, self.send_prefixes)

    def _send_answers(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        for connection in self.connections:
            connection.send_answers(added, removed)

    async def _answer(self, stream: ServerStream, scope: Scope) -> None:
        key = stream.head.answer_key
        if key is None or self.answers is None:
            await self.app(scope, stream.receive, stream.send)
        else:
            await self.answers.answer(self.app, scope, stream, key)


class ServerConnection(Connection):
    """One router's connection to a ``LinkServer``, with its open streams."""

    def __init__(self, server: LinkServer, secret: bytes, options: LinkOptions) -> None:
        handshake = Handshake("server", secret, options.window_bytes)
        super().__init__(handshake, options, server.counts)
        self._server = server
        self._streams: dict[int, ServerStream] = {}
        self._client = ("", 0)
        self._sent_load: Load | None = None
        self._load_checked_at = 0.0
        self._num_prefixes = 0  # PREFIXES frames sent
        self._wants_prefixes = False
        self._needs_snapshot = False
        self._wants_answers = False
        self._wants_adapters = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._server.connections.add(self)
        self._client = transport.get_extra_info("peername")[:2]
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.connections.discard(self)

    def on_ready(self) -> None:
        if self._server.is_draining:
            self.write(0, frames.GOAWAY)
        self._send_load()

    def send_prefixes(self, pieces: Iterable[PrefixEvents]) -> None:
        """Send changes of the prefix cache; a router that falls behind gets a snapshot later."""
        if not self._wants_prefixes:
            return
        if not self.writable:
            self._needs_snapshot = True
        elif not self._needs_snapshot:
            for piece in pieces:
                self.write(0, frames.PREFIXES, 0, frames.encode_prefixes(self._num_prefixes, piece))
                self._num_prefixes += 1

    def send_answers(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Send changes of the kept answers; they leave before the frames of their streams."""
        if self._wants_answers:
            self.write(0, frames.ANSWERS, 0, frames.encode_answers(added, removed))

    def send_adapters(self) -> None:
        if self._wants_adapters:
            self.write(0, frames.ADAPTERS, 0, encode_head(self._server.adapters))

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writable and self._needs_snapshot:
            self._send_snapshot()

    def on_frames(self, batch: list[Frame]) -> None:
        for stream_id, kind, flags, payload in batch:
            if kind == frames.REQUEST:
                self._on_request(stream_id, flags, payload)
            elif kind == frames.PREFIXES and not self._wants_prefixes:
                self._wants_prefixes = True
                self._send_snapshot()
            elif kind == frames.ANSWERS:
                self._subscribe_to_answers()
            elif kind == frames.ADAPTERS:
                self._wants_adapters = True
                self.send_adapters()
            elif kind not in (frames.WINDOW, frames.BODY, frames.CANCEL):
                self.handle_ping(kind)
            elif (stream := self._streams.get(stream_id)) is None:
                continue  # the stream ended while the frame was in transit
            elif kind == frames.WINDOW:
                stream.sender.add_credit(frames.decode_credit(payload))
            elif kind == frames.BODY:
                stream.on_body(payload, bool(flags & END))
            else:
                stream.disconnect(is_final=bool(flags & END))

    def on_closed(self, error: LinkError) -> None:
        if isinstance(error, LinkAuthError | LinkProtocolError):
            logger.warning("closed the link from %s:%d: %s", *self._client, error)
        for stream in list(self._streams.values()):
            stream.disconnect(is_lost=True)

    def on_tick(self) -> None:
        self._send_load()

    def _flush(self) -> None:
        # A LOAD that leaves with other frames costs no system call.
        self._send_load_if_due()
        super()._flush()

    def _on_request(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id or stream_id in self._streams:
            raise LinkProtocolError(f"REQUEST on stream {stream_id}, which is in use")
        if self._server.is_draining or len(self._streams) >= self.options.max_streams:
            reason = "drains" if self._server.is_draining else "has too many streams"
            refusal = encode_head((503, f"the replica {reason}"))
            self.write(stream_id, frames.ERROR, frames.REFUSED, refusal)
            return
        head = decode_head(payload, RequestHead)
        if not self._server.resumes and (head.keeps_journal or head.resume is not None):
            refusal = encode_head((503, "the replica does not continue answers of others"))
            self.write(stream_id, frames.ERROR, frames.REFUSED, refusal)
            return
        stream = ServerStream(self, stream_id, head, has_body=not flags & END)
        self._streams[stream_id] = stream
        stream.task = self._server.run_app(stream, self._client)
        stream.task.add_done_callback(partial(self._on_task_done, stream))
        self._send_load_if_due()

    def _on_task_done(self, stream: ServerStream, task: asyncio.Task[None]) -> None:
        del self._streams[stream.stream_id]
        stream.on_task_done(task)

    def _send_snapshot(self) -> None:
        if (events := self._server.prefix_snapshot()) is not None:
            self._needs_snapshot = False
            self.send_prefixes(frames.split_events(events))

    def _subscribe_to_answers(self) -> None:
        self._wants_answers = True
        ids = self._server.answers.ids() if self._server.answers is not None else []
        for start in range(0, len(ids), frames.MAX_ANSWER_IDS):
            self.send_answers(ids[start : start + frames.MAX_ANSWER_IDS], ())

    def _send_load_if_due(self) -> None:
        if self.loop.time() - self._load_checked_at > self.options.load_interval_s:
            self._send_load()

    def _send_load(self) -> None:
        self._load_checked_at = self.loop.time()
        load = self._server.current_load()
        if load != self._sent_load:
            self._sent_load = load
            self.write(0, frames.LOAD, 0, encode_head(load))
