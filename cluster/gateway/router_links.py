"""Links from one router to the others."""

import asyncio
from collections.abc import Iterable, Mapping
from ssl import SSLContext

from cluster.errors import LinkError, RequestError
from cluster.gateway.pools.replica import ReplicaInfo
from cluster.link import LinkClient, RequestHead


async def fetch(link: LinkClient, path: str, query: str, timeout_s: float) -> bytes | None:
    """Return another router's answer to a GET; None if it fails or takes too long."""
    head = RequestHead(method="GET", path=path, query_string=query.encode("latin-1"))
    try:
        async with asyncio.timeout(timeout_s):
            stream = link.open(head)
            try:
                response = await stream.head()
                body = b""
                while chunk := await stream.read():
                    body += chunk
            finally:
                stream.cancel()
        return body if response.status == 200 else None
    except (LinkError, RequestError, TimeoutError):
        return None


class RouterLinks:
    """A link to every other running router.

    Args:
        own_id: Id of this router.
        secret: Shared secret of the link's handshake.
        ssl: TLS context of the links; None for plain TCP.
    """

    def __init__(self, own_id: str, secret: bytes, ssl: SSLContext | None = None) -> None:
        self.own_id = own_id
        self.own_host: str | None = None
        """Address of this router's node; None until Serve reports this router as running."""
        self._secret = secret
        self._ssl = ssl
        self._links: dict[str, LinkClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def links(self) -> Mapping[str, LinkClient]:
        """Return the links by router id; some may not be connected."""
        return self._links

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Set the running routers; this router's own entry is ignored."""
        infos = {info.id: info for info in running}
        if (own := infos.pop(self.own_id, None)) is not None:
            self.own_host = own.host
        for gone in self._links.keys() - infos.keys():
            task = asyncio.ensure_future(self._links.pop(gone).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for id_ in infos.keys() - self._links.keys():
            info = infos[id_]
            link = self._links[id_] = LinkClient(info.host, info.port, self._secret, ssl=self._ssl)
            link.start()

    async def close(self) -> None:
        """Close every link."""
        self.update(())
        if self._closing:
            await asyncio.wait(self._closing)
