"""The router's end of a link: keeps one connection to one replica, and opens streams on it.

Owns the connection, its open streams and the task that reconnects. Does not choose replicas.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from enum import Enum
from ssl import SSLContext
from typing import TypeVar

from cluster.errors import (
    LinkAuthError,
    LinkClosedError,
    LinkError,
    LinkProtocolError,
    LinkRefusedError,
)
from cluster.link.client_connection import ClientConnection
from cluster.link.connection import LinkCounts, LinkOptions
from cluster.link.frames import PREFIXES, RequestHead
from cluster.link.prefixes import PrefixEvents
from cluster.link.stream import Stream
from cluster.load import Load

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_MIN_S = 0.05
_BACKOFF_MAX_S = 2.0


class LinkState(Enum):
    """What a link can be used for."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    SILENT = "silent"
    """Connected, but the replica has not answered for a while; it gets nothing new."""
    DRAINING = "draining"
    """The replica finishes the open streams and takes no new one."""
    CLOSED = "closed"


class LinkClient:
    """A link to the replica at one address.

    ``on_state`` and ``on_load`` may be set to functions that are called, on the event loop, after
    ``state`` (or ``failures``) or ``load`` changed; ``on_prefixes``, before ``start``, to one that
    is told what the replica says of its prefix cache. Each connection begins with all that it has.
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
        """What the replica said last on this connection."""
        self.last_error: LinkError | None = None
        """Why the last attempt or connection ended; None once one has come about."""
        self.failures = 0
        """Attempts that failed since the last connection."""
        self.counts = counts or LinkCounts()
        """What passed; several links may share them."""
        self.on_state: Callable[[LinkState], None] | None = None
        self.on_load: Callable[[Load], None] | None = None
        self.on_prefixes: Callable[[PrefixEvents], None] | None = None
        self._secret = secret
        self._ssl = ssl
        self._options = options or LinkOptions()
        self._connection: ClientConnection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._attempt: asyncio.Future[None] | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether ``open`` works now."""
        return self.state is LinkState.CONNECTED

    @property
    def num_open(self) -> int:
        """Streams that have not ended."""
        return len(self._connection.streams) if self._connection else 0

    def start(self) -> None:
        """Connect in the background, again and again until ``close``."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())

    async def connect(self, timeout_s: float = 5.0) -> None:
        """Start, and wait for the first connection; ``close`` is due also where this raises.

        Raises:
            LinkAuthError, LinkProtocolError: the peer is no replica of this cluster.
            LinkClosedError: nobody answered in time; it goes on trying in the background.
        """
        self.start()
        try:
            async with asyncio.timeout(timeout_s):
                while not self.connected:
                    if isinstance(self.last_error, LinkAuthError | LinkProtocolError):
                        raise self.last_error
                    if self.state is LinkState.CLOSED:
                        raise LinkClosedError("the link was closed")
                    await self._next_attempt()
        except TimeoutError:
            raise LinkClosedError(
                f"no link to {self.host}:{self.port} within {timeout_s} s: {self.last_error}"
            ) from None

    def open(self, head: RequestHead, body: bytes | AsyncIterator[bytes] = b"") -> Stream:
        """Send a request; returns at once.

        Raises:
            LinkRefusedError: not connected, or the replica drains.
        """
        if self._connection is None or not self.connected:
            raise LinkRefusedError(f"the link to {self.host}:{self.port} is {self.state.value}")
        stream = self._connection.open(head, body)
        if stream._pump is not None:
            self._pumps.add(stream._pump)
            stream._pump.add_done_callback(self._pumps.discard)
        return stream

    async def close(self) -> None:
        """End the connection; open streams fail with LinkClosedError. Safe to call twice."""
        self._set_state(LinkState.CLOSED)
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        if self._pumps:
            await asyncio.wait(self._pumps)

    # -- for the connection --

    def on_connected(self, connection: ClientConnection) -> None:
        """The replica has proved itself."""
        self._connection = connection
        if self.on_prefixes is not None:
            connection.write(0, PREFIXES)
        self.last_error = None
        self.failures = 0
        self._set_state(LinkState.CONNECTED)
        self._attempted()

    def on_loaded(self, load: Load) -> None:
        """The replica said what it has to do."""
        self.load = load
        self._tell(self.on_load, load)

    def on_told(self, events: PrefixEvents) -> None:
        """The replica said what changed in its prefix cache."""
        self._tell(self.on_prefixes, events)

    def on_silent(self, silent: bool) -> None:
        """The replica has fallen silent, or is heard again."""
        if self.state is not LinkState.DRAINING:
            self._set_state(LinkState.SILENT if silent else LinkState.CONNECTED)

    def on_goaway(self) -> None:
        """The replica drains."""
        self._set_state(LinkState.DRAINING)

    def on_lost(self, error: LinkError) -> None:
        """The connection that worked ended."""
        self._connection = None
        self.load = None
        self.last_error = error
        self._set_state(LinkState.CONNECTING)

    # -- inside --

    def _set_state(self, state: LinkState) -> None:
        if state is self.state or self.state is LinkState.CLOSED:
            return
        self.state = state
        self._tell(self.on_state, state)

    def _tell(self, callback: Callable[[T], None] | None, news: T) -> None:
        try:
            if callback is not None:
                callback(news)
        except Exception:  # a defect of the listener must not end the link
            logger.exception("a callback of the link to %s:%d failed", self.host, self.port)

    async def _next_attempt(self) -> None:
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._attempt)

    async def _run(self) -> None:
        try:
            while True:
                if not await self._live():
                    self.failures += 1
                    self._tell(self.on_state, self.state)
                longest_s = min(_BACKOFF_MAX_S, _BACKOFF_MIN_S * 2 ** min(self.failures + 1, 10))
                await asyncio.sleep(random.uniform(_BACKOFF_MIN_S, longest_s))
        finally:
            self._attempted()

    async def _live(self) -> bool:
        """One connection from its first to its last byte; False where none came about."""
        connection: ClientConnection | None = None
        try:
            connection = await self._dial()
            await connection.wait_ready()
            if connection.error is None:
                await connection.wait_closed()
                return True
            self._note(connection.error)
        except (OSError, ValueError) as error:  # ValueError: no host name at all
            self._note(LinkClosedError(f"cannot reach {self.host}:{self.port}: {error}"))
        finally:
            if connection is not None:
                connection.fail(LinkClosedError("the link was closed"))
                await connection.wait_closed()
        return False

    async def _dial(self) -> ClientConnection:
        async with asyncio.timeout(self._options.handshake_timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: ClientConnection(self, self._secret, self._options, self.counts),
                self.host,
                self.port,
                ssl=self._ssl,
            )
        return connection

    def _note(self, error: LinkError) -> None:
        if not self.failures or type(error) is not type(self.last_error):
            logger.warning("link to %s:%d: %s", self.host, self.port, error)
        self.last_error = error
        self._attempted()

    def _attempted(self) -> None:
        if self._attempt is not None and not self._attempt.done():
            self._attempt.set_result(None)
