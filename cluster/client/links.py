"""Links from one event loop to every router of the application.

Owns the links, and learns from the routers themselves which of them run. Knows neither Ray nor
what the requests mean.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from cluster.errors import LinkClosedError
from cluster.link import ClientStream, LinkClient, RequestHead, tls_contexts

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
"""How often it is asked which routers run, while requests are sent."""
CONNECT_TIMEOUT_S = 1.0
BLOCKED_S = 30.0
"""How long no link is tried after none could be opened: a firewall stands between, say."""

Offer = tuple[bytes, Sequence[tuple[str, int]]]
"""The cluster's secret, and the address of every router."""


class Links:
    """Sends each request over the link that has the fewest open.

    Args:
        offer: Asks for the present ``Offer``.
    """

    def __init__(self, offer: Callable[[], Awaitable[Offer]]) -> None:
        self._offer = offer
        self._loop = asyncio.get_running_loop()
        self._links: dict[tuple[str, int], LinkClient] = {}
        self._refresh_at = self._retry_at = self._loop.time()
        self._refresh: asyncio.Task[None] | None = None

    @property
    def num_connected(self) -> int:
        """Links that can be used now."""
        return sum(link.connected for link in self._links.values())

    async def open(self, head: RequestHead, body: bytes) -> ClientStream:
        """Send a request; returns once a link took it.

        Raises:
            LinkClosedError: no link can be opened, now and for a while.
        """
        link = self._least_used()
        due_at = self._refresh_at if link is not None else self._retry_at
        if self._refresh is None and self._loop.time() >= due_at:
            self._refresh = asyncio.create_task(self._learn())
        if link is None and self._refresh is not None:
            await asyncio.wait([self._refresh])
            link = self._least_used()
        if link is None:
            raise LinkClosedError("no link to a router")
        return link.open(head, body)

    async def close(self) -> None:
        """End every link."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.wait([self._refresh])
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _least_used(self) -> LinkClient | None:
        usable = [link for link in self._links.values() if link.connected]
        return min(usable, key=lambda link: link.num_open, default=None)

    async def _learn(self) -> None:
        try:
            await self._take(await self._offer())
        except Exception:  # whatever Ray or the network has; requests take the handle meanwhile
            logger.debug("no word of the routers", exc_info=True)
        finally:
            self._refresh = None
            now = self._loop.time()
            self._refresh_at = now + REFRESH_S
            self._retry_at = now if self.num_connected else now + BLOCKED_S

    async def _take(self, offer: Offer) -> None:
        secret, addresses = offer
        wanted = {(host, port) for host, port in addresses}
        for gone in self._links.keys() - wanted:
            if not self._links[gone].num_open:  # a router that ends lets its streams finish
                await self._links.pop(gone).close()
        tls = tls_contexts(os.environ)
        new = [
            LinkClient(host, port, secret, ssl=tls.client if tls else None)
            for host, port in wanted - self._links.keys()
        ]
        self._links.update({(link.host, link.port): link for link in new})
        connects = [link.connect(CONNECT_TIMEOUT_S) for link in new]
        await asyncio.gather(*connects, return_exceptions=True)
