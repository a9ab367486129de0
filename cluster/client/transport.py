"""How the client's requests reach a router: over links, else through Ray Serve's handle."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cluster.client.handle import HandleAnswer
from cluster.client.links import Links, Offer
from cluster.errors import LinkClosedError
from cluster.link import ClientStream, RequestHead, ResponseHead

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")

Answer = ClientStream | HandleAnswer

_HEADERS = [(b"content-type", b"application/json")]


class Opened(NamedTuple):
    """A request whose answer has begun; ``answer`` must be read to its end or cancelled."""

    head: ResponseHead
    answer: Answer


class Transport:
    """Requests from one event loop to the routers behind a handle."""

    def __init__(self, router: "DeploymentHandle") -> None:
        self._router = router
        self.links = Links(self._offer)

    async def open(self, method: str, path: str, body: bytes) -> Opened:
        """Send a request, and again over the handle where the link breaks before an answer.

        Raises:
            LinkError: the routers cannot be reached.
        """
        path, _, query = path.partition("?")
        head = RequestHead(method=method, path=path, query_string=query.encode(), headers=_HEADERS)
        try:
            return await _begun(await self.links.open(head, body))
        except LinkClosedError:
            items = self._router.options(stream=True).call.remote(head, body)
            return await _begun(HandleAnswer(items))

    async def ask(self, method: str, path: str, body: bytes) -> tuple[ResponseHead, bytes]:
        """A request and its whole answer; raises what ``open`` does."""
        head, answer = await self.open(method, path, body)
        try:
            chunks = []
            while chunk := await answer.read():
                chunks.append(chunk)
        finally:
            answer.cancel()
        return head, b"".join(chunks)

    async def close(self) -> None:
        """End the links."""
        await self.links.close()

    async def _offer(self) -> Offer:
        secret, addresses = await self._router.link_offer.remote()
        return secret, addresses


async def _begun(answer: Answer) -> Opened:
    try:
        return Opened(await answer.head(), answer)
    except BaseException:
        answer.cancel()
        raise


class BackgroundLoop:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tandem-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work`` there; an interrupt here cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def close(self) -> None:
        """End the loop, and what still runs in it."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self.loop.stop()

        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(end(), self.loop)
            if threading.current_thread() is not self._thread:
                self._thread.join()
