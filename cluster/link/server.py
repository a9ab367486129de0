"""The replica's end of a link: answers the streams of all routers with one ASGI application.

Owns the listening socket, the connections and one task for each stream. Does not know which
application it serves, nor who asks.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from ssl import SSLContext
from typing import NamedTuple

from cluster.asgi import ASGIApp, Scope
from cluster.errors import LinkAuthError, LinkError, LinkProtocolError
from cluster.link.connection import Connection, LinkCounts, LinkOptions
from cluster.link.exchange import Exchange
from cluster.link.frames import (
    BODY,
    CANCEL,
    END,
    ERROR,
    GOAWAY,
    LOAD,
    PREFIXES,
    REFUSED,
    REQUEST,
    WINDOW,
    Frame,
    RequestHead,
    decode_credit,
    decode_head,
    encode_head,
)
from cluster.link.handshake import Handshake
from cluster.link.prefixes import PrefixEvents, PrefixSource, encode_prefixes, pieces_of
from cluster.load import Load

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 1.0
PREFIXES_INTERVAL_S = 0.02
"""Changes of the prefix cache are told together at most this late."""


class DrainResult(NamedTuple):
    """How the streams that were ongoing at the start of a drain ended."""

    finished: int
    cancelled: int


class LinkServer:
    """Serves ``app`` to every router that knows the secret.

    ``load`` is asked for what the engine has to do; it must not block. ``prefixes`` knows the
    engine's prefix cache, where it has one, and is used by this server alone.
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
        options: LinkOptions | None = None,
    ) -> None:
        self.app = app
        self.address = (host, port)
        """Where to reach it; the port is true once it was started."""
        self.draining = False
        self.counts = LinkCounts()
        """Of all connections."""
        self._secret = secret
        self._load = load
        self._prefixes = prefixes
        self._telling: asyncio.TimerHandle | None = None
        self._ssl = ssl
        self._options = options or LinkOptions()
        self._server: asyncio.Server | None = None
        self._connections: set[_ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> tuple[str, int]:
        """Listen; returns the address. Port 0 takes a free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._accept,
            *self.address,
            ssl=self._ssl,
            ssl_handshake_timeout=self._options.handshake_timeout_s if self._ssl else None,
            backlog=1024,
        )
        self.address = self._server.sockets[0].getsockname()[:2]
        if self._prefixes is not None:
            self._prefixes.take()  # nobody was there to be told; news begin now
            self._prefixes.on_news = self._tell_later
        return self.address

    @property
    def num_ongoing(self) -> int:
        """Streams whose application has not returned."""
        return len(self._tasks)

    def current_load(self) -> Load:
        """What the engine says, and the ongoing streams."""
        engine: Load = self._load() if self._load is not None else Load()
        return Load(engine.running, engine.waiting, engine.kv_cache_usage, self.num_ongoing)

    def retire(self) -> None:
        """Refuse new streams from now on; the ongoing ones and the connections stay.

        Routers look elsewhere, and nobody takes this for an address that does not answer.
        """
        self.draining = True
        for connection in self._connections:
            connection.write(0, GOAWAY)

    async def drain(self, timeout_s: float) -> DrainResult:
        """Refuse new streams, wait for the ongoing ones, cancel what is left, close.

        A cancelled stream ends with an error (503) on the router's side.
        """
        if self._server is not None:
            self._server.close()
        if self._prefixes is not None:
            self._prefixes.on_news = None
        if self._telling is not None:
            self._telling.cancel()
        self.retire()
        tasks, left = set(self._tasks), set[asyncio.Task[None]]()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=timeout_s)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_CLOSE_TIMEOUT_S)
        shuts = [c.shut(_CLOSE_TIMEOUT_S, "the replica stopped") for c in self._connections]
        await asyncio.gather(*shuts)
        if self._server is not None:
            await self._server.wait_closed()
        return DrainResult(finished=len(tasks) - len(left), cancelled=len(left))

    async def stop(self) -> None:
        """Cancel everything and close."""
        await self.drain(0)

    # -- for the connections --

    def run(self, exchange: Exchange, client: tuple[str, int]) -> asyncio.Task[None]:
        """Answer one stream in a task of its own."""
        scope = exchange.scope(self.address, client)
        task = asyncio.get_running_loop().create_task(self._answer(exchange, scope))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def prefixes_now(self) -> PrefixEvents | None:
        """All that the engine has cached; None where it caches no prefixes."""
        if self._prefixes is None:
            return None
        return PrefixEvents(stored=self._prefixes.snapshot(), cleared=True)

    def _tell_later(self) -> None:
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(PREFIXES_INTERVAL_S, self._tell_prefixes)

    def _tell_prefixes(self) -> None:
        self._telling = None
        events = self._prefixes.take() if self._prefixes is not None else None
        if events is not None:
            pieces = list(pieces_of(events))
            for connection in self._connections:
                connection.tell(pieces)

    async def _answer(self, exchange: Exchange, scope: Scope) -> None:
        await self.app(scope, exchange.receive, exchange.send)

    def _accept(self) -> "_ServerConnection":
        return _ServerConnection(self, self._connections, self._secret, self._options)


class _ServerConnection(Connection):
    """One router's connection to a LinkServer, with the streams that it has open."""

    def __init__(
        self,
        server: LinkServer,
        connections: "set[_ServerConnection]",
        secret: bytes,
        options: LinkOptions,
    ) -> None:
        handshake = Handshake("server", secret, options.window_bytes)
        super().__init__(handshake, options, server.counts)
        self._server = server
        self._connections = connections
        self._exchanges: dict[int, Exchange] = {}
        self._client = ("", 0)
        self._load: Load | None = None
        self._load_said = 0.0
        self._num_prefixes = 0
        self._wants_prefixes = False
        self._must_tell_all = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connections.add(self)
        self._client = transport.get_extra_info("peername")[:2]
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.discard(self)

    def on_ready(self) -> None:
        if self._server.draining:
            self.write(0, GOAWAY)
        self._say_load()

    def tell(self, pieces: Iterable[PrefixEvents]) -> None:
        """Say what changed in the prefix cache; a router that is behind gets all of it later."""
        if not self._wants_prefixes:
            return
        if not self.writable:
            self._must_tell_all = True
        elif not self._must_tell_all:
            for piece in pieces:
                self.write(0, PREFIXES, 0, encode_prefixes(self._num_prefixes, piece))
                self._num_prefixes += 1

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writable and self._must_tell_all:
            self._tell_all()

    def on_frames(self, frames: list[Frame]) -> None:
        for stream_id, kind, flags, payload in frames:
            if kind == REQUEST:
                self._on_request(stream_id, flags, payload)
            elif kind == PREFIXES and not self._wants_prefixes:
                self._wants_prefixes = True
                self._tell_all()
            elif kind not in (WINDOW, BODY, CANCEL):
                self.answer(kind)
            elif (exchange := self._exchanges.get(stream_id)) is None:
                continue  # it ended while the frame was on its way
            elif kind == WINDOW:
                exchange.on_credit(decode_credit(payload))
            elif kind == BODY:
                exchange.on_body(payload, bool(flags & END))
            else:
                exchange.leave()

    def on_closed(self, error: LinkError) -> None:
        if isinstance(error, LinkAuthError | LinkProtocolError):
            logger.warning("link from %s:%d: %s", *self._client, error)
        for exchange in list(self._exchanges.values()):
            exchange.leave()

    def on_tick(self) -> None:
        self._say_load()

    def _flush(self) -> None:
        if self.loop.time() - self._load_said > self.options.load_interval_s:
            self._say_load()
        super()._flush()

    def _on_request(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id or stream_id in self._exchanges:
            raise LinkProtocolError(f"REQUEST on stream {stream_id}, which is in use")
        if self._server.draining or len(self._exchanges) >= self.options.max_streams:
            reason = "drains" if self._server.draining else "has too many streams"
            refusal = encode_head((503, f"the replica {reason}"))
            self.write(stream_id, ERROR, REFUSED, refusal)
            return
        head = decode_head(payload, RequestHead)
        exchange = Exchange(self, stream_id, head, has_body=not flags & END)
        self._exchanges[stream_id] = exchange
        exchange.task = self._server.run(exchange, self._client)
        exchange.task.add_done_callback(partial(self._settle, exchange))
        if self.loop.time() - self._load_said > self.options.load_interval_s:
            self._say_load()

    def _settle(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        del self._exchanges[exchange.stream_id]
        exchange.settle(task)

    def _tell_all(self) -> None:
        if (events := self._server.prefixes_now()) is not None:
            self._must_tell_all = False
            self.tell(pieces_of(events))

    def _say_load(self) -> None:
        """Write LOAD if it is news; between two flushes this is free of system calls."""
        self._load_said = self.loop.time()
        load = self._server.current_load()
        if load != self._load:
            self._load = load
            self.write(0, LOAD, 0, encode_head(load))
