"""Links from one router to the others. Owns the links; knows not what they are used for."""

import asyncio
from collections.abc import Iterable, Mapping
from ssl import SSLContext

from cluster.gateway.pools.pool import ReplicaInfo
from cluster.link import LinkClient


class RouterLinks:
    """A link to every other router that runs.

    Args:
        own_id: This router's id among them.
        secret: What both ends of a link must know.
        ssl: For links, where they use TLS.
    """

    def __init__(self, own_id: str, secret: bytes, ssl: SSLContext | None = None) -> None:
        self.own_id = own_id
        self._secret = secret
        self._ssl = ssl
        self._links: dict[str, LinkClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def links(self) -> Mapping[str, LinkClient]:
        """The links by the other routers' ids; one may not be connected."""
        return self._links

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Take the routers that run, with or without this one."""
        infos = {info.id: info for info in running if info.id != self.own_id}
        for gone in self._links.keys() - infos.keys():
            task = asyncio.ensure_future(self._links.pop(gone).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for name in infos.keys() - self._links.keys():
            info = infos[name]
            link = self._links[name] = LinkClient(info.host, info.port, self._secret, ssl=self._ssl)
            link.start()

    async def close(self) -> None:
        """End every link."""
        self.update(())
        if self._closing:
            await asyncio.wait(self._closing)
