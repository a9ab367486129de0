"""The routers among themselves: each tells the others every second what its tenants take.

Owns the task that reports. A router that cannot be reached
counts as one that is silent (``cluster.admission.leases``); nothing waits for it.
"""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from cluster.admission.leases import SETTLE_S, QuotaReport
from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.errors import LinkError, RequestError
from cluster.gateway.gateway import Gateway
from cluster.gateway.pools.pool import ReplicaInfo
from cluster.gateway.router_links import RouterLinks
from cluster.link import LinkClient, RequestHead

logger = logging.getLogger("ray.serve.tandem")

LEASES_PATH = "/internal/leases"
MAX_REPORT_BYTES = 4 * 1024**2

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(QuotaReport).decode


class QuotaSync:
    """This router among the others.

    Args:
        gateway: Whose tenants these are; it looks for changed keys at the same time.
        links: To the other routers.
    """

    def __init__(self, gateway: Gateway, links: RouterLinks) -> None:
        self._gateway = gateway
        self._links = links
        self._task = asyncio.create_task(self._run())

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Take the routers that run, with or without this one."""
        self._links.update(running)
        self._gateway.admission.set_peers(self._links.links())

    def app(self, inside: ASGIApp) -> ASGIApp:
        """``inside`` and the path on which other routers report."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == LEASES_PATH:
                status = 204 if self._receive(await _body(receive)) else 400
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            else:
                await inside(scope, receive, send)

        return answer

    async def settle(self) -> None:
        """Look for changed keys, settle this router's parts of all limits, tell the others."""
        self._gateway.admission.refresh()
        report = _encode(self._gateway.admission.report(self._links.own_id))
        links = [link for link in self._links.links().values() if link.connected]
        await asyncio.gather(*(_tell(link, report) for link in links))

    async def close(self) -> None:
        """End the task."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_S)
            try:
                await self.settle()
            except Exception:  # the next second may be better
                logger.exception("tenants' limits could not be settled")

    def _receive(self, body: bytes | None) -> bool:
        if body is None:
            return False
        try:
            report = _decode(body)
        except msgspec.DecodeError as error:  # of another version
            logger.warning("a router's report cannot be read: %s", error)
            return False
        self._gateway.admission.receive(report, self._gateway.pools.values())
        return True


async def _tell(link: LinkClient, report: bytes) -> None:
    with suppress(LinkError, RequestError, TimeoutError):
        stream = link.open(RequestHead(method="POST", path=LEASES_PATH), report)
        try:
            async with asyncio.timeout(SETTLE_S):
                await stream.head()
        finally:
            stream.cancel()


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None where it is too large or its sender left."""
    body = bytearray()
    while len(body) <= MAX_REPORT_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
    return None
