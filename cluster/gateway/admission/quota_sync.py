"""Exchange of quota reports between routers, once per second, over links.

A router that cannot be reached counts as silent (``cluster.admission.leases``); nothing waits
for it.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec

from cluster.admission.leases import SETTLE_S, QuotaReport
from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.errors import LinkError, RequestError
from cluster.gateway.admission.admission import Admission
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.replica import ReplicaInfo
from cluster.gateway.router_links import RouterLinks
from cluster.link import LinkClient, RequestHead

logger = logging.getLogger("ray.serve.tandem")

LEASES_PATH = "/internal/leases"
MAX_REPORT_BYTES = 4 * 1024**2

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(QuotaReport).decode


class QuotaSync:
    """Task that reloads keys, settles quotas and reports to the other routers.

    Args:
        admission: Admission of this router.
        pools: Its pools, by name.
        links: Links to the other routers.
    """

    def __init__(self, admission: Admission, pools: Mapping[str, Pool], links: RouterLinks) -> None:
        self._admission = admission
        self._pools = pools
        self._links = links
        self._task = asyncio.create_task(self._run())

    def update_routers(self, running: Iterable[ReplicaInfo]) -> None:
        """Set the running routers; this router's own entry is ignored."""
        self._links.update(running)
        self._admission.quotas.peers.set_routers(frozenset(self._links.links()))

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` with the path on which other routers report."""

        async def with_reports(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == LEASES_PATH:
                status = 204 if self._receive(await _read_body(receive)) else 400
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            else:
                await app(scope, receive, send)

        return with_reports

    async def settle(self) -> None:
        """Reload changed keys, settle this router's quotas, and report to the others."""
        await self._admission.refresh_keys()
        report = _encode(self._admission.quotas.settle(self._links.own_id))
        links = [link for link in self._links.links().values() if link.connected]
        await asyncio.gather(*(_send_report(link, report) for link in links))

    async def close(self) -> None:
        """Stop the task."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_S)
            try:
                await self.settle()
            except Exception:  # keep the old shares and retry
                logger.exception("Settling the tenants' quotas failed; retrying in %g s.", SETTLE_S)

    def _receive(self, body: bytes | None) -> bool:
        if body is None:
            return False
        try:
            report = _decode(body)
        except msgspec.DecodeError as error:
            logger.warning("Cannot decode a router's report (of another version?): %s", error)
            return False
        # Charge the tenants here for what other routers served them, so that all routers together
        # share fairly.
        served = self._admission.quotas.peers.add_report(report, time.monotonic())
        for pool in self._pools.values():
            for (tenant, model), tokens in served.items():
                if model in pool.models:
                    pool.queue.charge_tenant(tenant, tokens)
        return True


async def _send_report(link: LinkClient, report: bytes) -> None:
    with suppress(LinkError, RequestError, TimeoutError):
        stream = link.open(RequestHead(method="POST", path=LEASES_PATH), report)
        try:
            async with asyncio.timeout(SETTLE_S):
                await stream.head()
        finally:
            stream.cancel()


async def _read_body(receive: Receive) -> bytes | None:
    """Return the body; None if it is too large or incomplete."""
    body = bytearray()
    while len(body) <= MAX_REPORT_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
    return None
