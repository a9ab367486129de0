"""Transport of the client's requests to a router: over links, or over Ray Serve's handle."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from cluster.client.repeating import Answer, RepeatedAnswer
from cluster.client.wire import GENERATING_PATHS, JSON
from cluster.config.applications import is_application_path
from cluster.errors import LinkClosedError, RequestError
from cluster.link import ClientStream, LinkClient, RequestHead, ResponseHead, tls_contexts
from cluster.usage import Usage

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
"""Seconds between updates of the list of routers, while requests are sent."""
CONNECT_TIMEOUT_S = 1.0
BLOCKED_S = 30.0
"""Seconds without new attempts after no link could be opened, for example because of a firewall."""
OFFER_TIMEOUT_S = 10.0
"""Seconds for which Serve's handle may wait for a router, if none runs."""

_HEADERS = [(b"content-type", JSON)]

Headers = Sequence[tuple[bytes, bytes]]
"""Headers of a request, beside those that every request has."""

Item = ResponseHead | bytes | Usage
"""Item of a streaming call over a handle: the head, then pieces of the body, then the usage."""


class LinkOffer(NamedTuple):
    """Secret and addresses with which a process opens links to the routers."""

    secret: bytes
    addresses: list[tuple[str, int]]
    """Host and port of every running router."""


class HandleAnswer:
    """Response of a streaming call over Ray Serve's handle, with the interface of ``ClientStream``.

    Far slower than a link, because each item crosses Ray's object plane, but it works wherever Ray
    does.
    """

    def __init__(self, items: Any) -> None:
        self.usage: Usage | None = None
        self._items = items
        self._iterator: AsyncIterator[Item] = aiter(items)

    async def head(self) -> ResponseHead:
        head = await self._next()
        assert isinstance(head, ResponseHead)
        return head

    async def read(self) -> bytes:
        while not isinstance(item := await self._next(), bytes):
            if item is None:
                return b""
            if isinstance(item, Usage):
                self.usage = item
        return item

    def cancel(self) -> None:
        self._items.cancel()

    async def _next(self) -> Item | None:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        try:
            return await anext(self._iterator)
        except StopAsyncIteration:
            return None
        except RayTaskError as error:
            if isinstance(error.cause, RequestError):
                raise error.cause from error
            raise LinkClosedError(f"the other end failed: {error.cause}") from error
        except (RayError, RayServeException) as error:
            reason = str(error).splitlines()[0]
            raise LinkClosedError(f"{type(error).__name__}: {reason}") from error


class ClientLinks:
    """Links from one event loop to every router; each request takes the least used one."""

    def __init__(self, get_offer: Callable[[], Awaitable[LinkOffer]]) -> None:
        self._get_offer = get_offer
        self._loop = asyncio.get_running_loop()
        self._links: dict[tuple[str, int], LinkClient] = {}
        self._refresh_at = self._retry_at = self._loop.time()
        self._refresh: asyncio.Task[None] | None = None
        self.is_silent = False
        """True if no router gave its address when they were last asked."""

    @property
    def num_connected(self) -> int:
        return sum(link.connected for link in self._links.values())

    async def open(self, head: RequestHead, body: bytes) -> ClientStream:
        """Send a request; wait only if no link is connected.

        Raises:
            LinkClosedError: no link can be opened.
        """
        link = self._least_used()
        due_at = self._refresh_at if link is not None else self._retry_at
        if self._refresh is None and self._loop.time() >= due_at:
            self._refresh = asyncio.create_task(self._refresh_links())
        if link is None and self._refresh is not None:
            await asyncio.wait([self._refresh])
            link = self._least_used()
        if link is None:
            raise LinkClosedError("no link to a router")
        return link.open(head, body)

    async def close(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.wait([self._refresh])
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _least_used(self) -> LinkClient | None:
        usable = [link for link in self._links.values() if link.connected]
        return min(usable, key=lambda link: link.num_open, default=None)

    async def _refresh_links(self) -> None:
        retry_s, self.is_silent = 0.0, True
        try:
            async with asyncio.timeout(OFFER_TIMEOUT_S):
                offer = await self._get_offer()
            self.is_silent = False
            await self._apply_offer(offer)
            retry_s = 0.0 if self.num_connected else BLOCKED_S
        except Exception:  # any error of Ray or the network; the next request asks again
            logger.debug("could not update the list of routers", exc_info=True)
        finally:
            self._refresh = None
            now = self._loop.time()
            self._refresh_at = now + REFRESH_S
            self._retry_at = now + retry_s

    async def _apply_offer(self, offer: LinkOffer) -> None:
        wanted = {(host, port) for host, port in offer.addresses}
        for gone in self._links.keys() - wanted:
            if not self._links[gone].num_open:  # a draining router finishes its streams
                await self._links.pop(gone).close()
        tls = tls_contexts(os.environ)
        new = [
            LinkClient(host, port, offer.secret, ssl=tls.client if tls else None)
            for host, port in wanted - self._links.keys()
        ]
        self._links.update({(link.host, link.port): link for link in new})
        connects = [link.connect(CONNECT_TIMEOUT_S) for link in new]
        await asyncio.gather(*connects, return_exceptions=True)


class Opened(NamedTuple):
    """A request whose response has started; ``answer`` must be read to its end or cancelled."""

    head: ResponseHead
    answer: RepeatedAnswer


class Transport:
    """Requests from one event loop to the routers behind a handle."""

    def __init__(self, router: "DeploymentHandle") -> None:
        self._router = router
        self.links = ClientLinks(self._get_offer)

    async def open(self, method: str, path: str, body: bytes, headers: Headers = ()) -> Opened:
        """Send a request; another router goes on with the answer if one is lost.

        Raises:
            LinkClosedError, UnavailableError: no router answers.
        """
        answer = self._answer(method, path, body, headers)
        try:
            return Opened(await answer.head(), answer)
        except BaseException:
            answer.cancel()
            raise

    async def ask(
        self, method: str, path: str, body: bytes, headers: Headers = ()
    ) -> tuple[ResponseHead, bytes]:
        """Send a request and return the whole response; raises as ``open`` does."""
        answer = self._answer(method, path, body, headers)
        try:
            return await answer.whole()
        finally:
            answer.cancel()

    async def close(self) -> None:
        await self.links.close()

    def _answer(self, method: str, path: str, body: bytes, more: Headers) -> RepeatedAnswer:
        path, _, query = path.partition("?")
        has_type = any(name == b"content-type" for name, _ in more)
        headers = [*(() if has_type else _HEADERS), *more]
        if path in GENERATING_PATHS or is_application_path(path):
            headers = [*headers, (b"idempotency-key", uuid4().hex.encode())]
        head = RequestHead(method=method, path=path, query_string=query.encode(), headers=headers)
        return RepeatedAnswer(partial(self._send, head, body))

    async def _send(self, head: RequestHead, body: bytes) -> Answer:
        """Send a request over a link, or over the handle without a link."""
        try:
            return await self.links.open(head, body)
        except LinkClosedError:
            if self.links.is_silent:  # the handle would wait as well, without end
                raise
            return HandleAnswer(self._router.options(stream=True).call.remote(head, body))

    async def _get_offer(self) -> LinkOffer:
        return LinkOffer(*await self._router.link_offer.remote())
