"""One process' way to the running application: finds it, keeps its connections, runs its calls.

Owns a transport for each event loop that asks, and a loop in the background for synchronous
callers. Imports Ray only once something is asked.
"""

import asyncio
import importlib
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.client import wire
from cluster.client.calls import CHAT, Call
from cluster.client.results import Delta
from cluster.client.transport import Answer, BackgroundLoop, Transport
from cluster.errors import LinkError, UnavailableError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")

MAX_CONCURRENT = 64
"""Requests of one call that are under way at a time; the rest of a long list waits here."""


class Session:
    """Connections to one application.

    Args:
        app: The Serve application's name.
        address: Passed to ``ray.init`` where this process has not connected to Ray yet.
    """

    def __init__(self, app: str, address: str) -> None:
        self.app = app
        self.address = address
        self._lock = threading.Lock()
        self._transports: dict[asyncio.AbstractEventLoop, Transport] = {}

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work``, which uses this session, for a synchronous caller."""
        try:
            with self._lock:
                assert self._router is not None  # found in this thread, which may wait for Ray
                background = self._background
        except BaseException:
            work.close()
            raise
        return background.run(work)

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """The results of all calls, in order; where one fails, the others are cancelled.

        Raises:
            RequestError: the answer's typed error; UnavailableError where none came.
        """
        transport = self._transport()
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(call: Call) -> list[Any]:
            method, body = ("GET", b"") if call.body is None else ("POST", wire.encode(call.body))
            async with places:
                head, answer = await transport.ask(method, call.path, body)
            return call.parse(wire.decode(head.status, head.headers, answer))

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            with _translated(self.app):
                parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # nobody waits for these any more
                task.cancel()
            raise
        return [result for part in parts for result in part]

    async def delta_batches(self, body: bytes) -> AsyncGenerator[list[Delta], None]:
        """The pieces of a streamed chat, all that have come since the last ones at once."""
        reader = wire.DeltaReader()
        with _translated(self.app):
            head, answer = await self._transport().open("POST", CHAT, body)
            try:
                if head.status != 200:
                    chunks = [chunk async for chunk in _chunks(answer)]
                    raise wire.error_from(head.status, head.headers, b"".join(chunks))
                async for chunk in _chunks(answer):
                    yield list(reader.feed(chunk))
            finally:
                answer.cancel()

    def close(self) -> None:
        """End the connections of the synchronous calls."""
        if "_background" in self.__dict__:
            self._background.close()
            del self.__dict__["_background"]

    async def aclose(self) -> None:
        """End the connections of this event loop."""
        with self._lock:
            transport = self._transports.pop(asyncio.get_running_loop(), None)
        if transport is not None:
            await transport.close()

    @cached_property
    def _router(self) -> "DeploymentHandle":
        # Imported here, so that importing the client stays cheap.
        import_serve()
        import ray
        from ray import serve

        with _translated(self.app):
            if not ray.is_initialized():
                ray.init(address=self.address, logging_level="WARNING", log_to_driver=False)
            handle = serve.get_app_handle(self.app)
            # A cluster that is tuned for throughput tells its jobs to run handles in the caller's
            # own event loop, which a synchronous caller has none of.
            if not handle.is_initialized:  # Serve gives the same handle to all of a process
                handle._init(_run_router_in_separate_loop=True)
            return handle

    @cached_property
    def _background(self) -> BackgroundLoop:
        """Where the synchronous calls run."""
        background = BackgroundLoop()
        weakref.finalize(self, background.close)
        return background

    def _transport(self) -> Transport:
        loop, router = asyncio.get_running_loop(), self._router
        with self._lock:
            if loop not in self._transports:
                for ended in [other for other in self._transports if other.is_closed()]:
                    del self._transports[ended]
                self._transports[loop] = Transport(router)
            return self._transports[loop]


def import_serve() -> None:
    """Import Ray Serve, in a thread of its own.

    Ray cancels a task by interrupting its worker's main thread, and an import that is cut off
    there leaves a package without its modules, on which each later task of the worker fails.
    """
    thread = threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True)
    thread.start()
    thread.join()


async def _chunks(answer: Answer) -> AsyncIterator[bytes]:
    while chunk := await answer.read():
        yield chunk


@contextmanager
def _translated(app: str) -> Iterator[None]:
    """Turn Ray's own errors into ours.

    Raises:
        UnavailableError: there is no cluster or no such application, or its router was lost.
    """
    try:
        yield
    except Exception as error:
        of_ray = type(error).__module__.partition(".")[0] == "ray"
        if not (of_ray or isinstance(error, LinkError | ConnectionError)):
            raise
        raise UnavailableError(
            f"The application {app!r} cannot be reached on this Ray cluster "
            f"(`tandem up` starts one): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
