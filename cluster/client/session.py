"""Connections of one process to the running application.

Owns a transport for each event loop that sends requests, and a background event loop for
synchronous callers. Imports Ray on the first request.
"""

import asyncio
import importlib
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.client import wire
from cluster.client.repeating import read_all
from cluster.client.results import Delta
from cluster.client.transport import Headers, Transport
from cluster.client.wire import CHAT, ApiRequest, EventReader
from cluster.errors import LinkError, UnavailableError
from cluster.serve_internals import init_handle

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")

MAX_CONCURRENT = 64
"""Requests of one method call that are sent at the same time; the others wait in the client."""


class Session:
    """Connections to one application; see ``Tandem`` for the arguments."""

    def __init__(self, app: str, address: str, timeout_s: float | None = None) -> None:
        self.app = app
        self.address = address
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self.transports: dict[asyncio.AbstractEventLoop, Transport] = {}

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses this session, for a synchronous caller."""
        try:
            with self._lock:
                assert self._router is not None  # found here, where waiting for Ray is allowed
                background = self._background
        except BaseException:
            work.close()
            raise
        return background.run(work)

    def iterate(self, batches: AsyncGenerator[list[T], None]) -> Iterator[T]:
        """Yield the items of a stream, for a synchronous caller; close it at the end."""
        try:
            while (items := self.wait_for(_next(batches))) is not None:
                yield from items
        finally:
            self.wait_for(batches.aclose())

    async def run(self, requests: Sequence[ApiRequest], headers: Headers = ()) -> list[Any]:
        """Return the results of all requests, in order; if one fails, the others are cancelled.

        Raises:
            RequestError: an answer is an error, or none arrived (UnavailableError).
            TimeoutError: an answer took longer than ``timeout_s``.
        """
        transport = await self._ready_transport()
        limit = asyncio.Semaphore(MAX_CONCURRENT)

        async def send(request: ApiRequest) -> list[Any]:
            form_headers: Headers = ()
            body = b""
            if request.body is not None:
                body = wire.encode(request.body)
            elif request.form is not None:
                content_type, body = wire.form(request.form)
                form_headers = [(b"content-type", content_type)]
            async with limit:
                method = request.method or ("POST" if body else "GET")
                asked = transport.ask(method, request.path, body, (*form_headers, *headers))
                head, answer = await self._within(asked)
            if request.is_file and head.status == 200:
                return request.parse(answer)
            return request.parse(wire.decode(head.status, head.headers, answer))

        tasks = [asyncio.ensure_future(send(request)) for request in requests]
        try:
            with _ray_errors_translated(self.app):
                parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # gather leaves the others running
                task.cancel()
            raise
        return [result for part in parts for result in part]

    def delta_batches(
        self, body: bytes, headers: Headers = ()
    ) -> AsyncGenerator[list[Delta], None]:
        """Yield the pieces of a streamed chat, in batches of those that arrived together."""
        return self.batches(CHAT, body, wire.DeltaReader(), headers)

    async def batches(
        self, path: str, body: bytes, reader: EventReader[T], headers: Headers = ()
    ) -> AsyncGenerator[list[T], None]:
        """Yield the events of a stream, in batches of those that arrived together."""
        with _ray_errors_translated(self.app):
            transport = await self._ready_transport()
            head, answer = await self._within(transport.open("POST", path, body, headers))
            try:
                if head.status != 200:
                    error_body = await self._within(read_all(answer))
                    raise wire.error_from(head.status, head.headers, error_body)
                while chunk := await self._within(answer.read()):
                    yield list(reader.feed(chunk))
            finally:
                answer.cancel()

    async def _within(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work
        except TimeoutError:
            raise TimeoutError(
                f"No answer of the application {self.app!r} within {self.timeout_s:g} s. "
                "Raise `timeout_s` if the work takes longer."
            ) from None

    def close(self) -> None:
        if (background := self.__dict__.pop("_background", None)) is not None:
            background.close()

    async def aclose(self) -> None:
        with self._lock:
            transport = self.transports.pop(asyncio.get_running_loop(), None)
        if transport is not None:
            await transport.close()

    @cached_property
    def _router(self) -> "DeploymentHandle":
        import_serve()  # here, so that importing the client stays cheap
        import ray
        from ray import serve

        with _ray_errors_translated(self.app):
            if not ray.is_initialized():
                ray.init(address=self.address, logging_level="WARNING", log_to_driver=False)
            handle = serve.get_app_handle(self.app)
            init_handle(handle)
            return handle

    @cached_property
    def _background(self) -> "BackgroundLoop":
        background = BackgroundLoop()
        weakref.finalize(self, background.close)
        return background

    async def _ready_transport(self) -> Transport:
        if "_router" not in self.__dict__:  # waiting for Ray would block the event loop
            await asyncio.to_thread(getattr, self, "_router")
        return self._transport()

    def _transport(self) -> Transport:
        loop, router = asyncio.get_running_loop(), self._router
        with self._lock:
            if loop not in self.transports:
                for closed in [other for other in self.transports if other.is_closed()]:
                    del self.transports[closed]
                self.transports[loop] = Transport(router)
            return self.transports[loop]


class BackgroundLoop:
    """An event loop in its own thread, for synchronous callers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tandem-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for it; an interrupt cancels it."""
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
        """Cancel running work and stop the loop."""

        async def stop() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self.loop.stop()

        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(stop(), self.loop)
            if threading.current_thread() is not self._thread:
                self._thread.join()


async def _next(batches: AsyncGenerator[list[T], None]) -> list[T] | None:
    return await anext(batches, None)


def import_serve() -> None:
    # Ray cancels a task by interrupting its worker's main thread. An import that is interrupted
    # leaves a package without some of its modules, and every later task of the worker would fail.
    thread = threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True)
    thread.start()
    thread.join()


@contextmanager
def _ray_errors_translated(app: str) -> Iterator[None]:
    """Turn errors of Ray, links and connections into UnavailableError."""
    try:
        yield
    except Exception as error:
        is_ray_error = type(error).__module__.partition(".")[0] == "ray"
        if not (is_ray_error or isinstance(error, LinkError | ConnectionError)):
            raise
        raise UnavailableError(
            f"The application {app!r} cannot be reached on this Ray cluster "
            f"(`tandem up` starts one): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
