"""TCP proxy in front of a replica's link server: delay, loss and partitions of its links.

It holds back bytes and never drops any, as TCP does on a bad network: a lost segment arrives after
a retransmission, and one of a partition when that ends.
"""

import asyncio
import random
from collections.abc import Callable

import msgspec

RETRANSMISSION_S = 0.2
"""Linux's minimum retransmission timeout."""
CHUNK_BYTES = 65536


class LinkFault(msgspec.Struct, frozen=True):
    """State of the network between the routers and one replica."""

    delay_s: float = 0.0
    """Delay in each direction."""
    loss: float = 0.0
    """Share of segments (0 to 1) that are lost and sent again."""
    holds_requests: bool = False
    """True if nothing from the routers arrives."""
    holds_answers: bool = False
    """True if nothing from the replica arrives."""


class LinkProxy:
    """Proxy of one link server."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._fault = LinkFault()
        self._changed = asyncio.Event()
        self._random = random.Random(0)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> tuple[str, int]:
        """Listen on a free port of the target's address; return it."""
        self._server = await asyncio.start_server(self._accept, self._target[0], 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def close(self) -> None:
        """Stop listening and close all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def set_fault(self, fault: LinkFault) -> None:
        """Change the network's state at once."""
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        async with asyncio.TaskGroup() as both:
            both.create_task(self._pump(reader, to_writer, lambda: self._fault.holds_requests))
            both.create_task(self._pump(to_reader, writer, lambda: self._fault.holds_answers))

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        is_held: Callable[[], bool],
    ) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                while is_held():
                    await self._changed.wait()
                if wait_s := self._wait_s():
                    await asyncio.sleep(wait_s)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def _wait_s(self) -> float:
        is_lost = self._random.random() < self._fault.loss
        return self._fault.delay_s + (RETRANSMISSION_S if is_lost else 0.0)
