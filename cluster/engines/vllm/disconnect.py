"""Cancellation of ASGI applications that work in detached tasks.

vLLM's handlers of non-streaming responses do: cancelling their caller leaves the request running in
the engine. They do react to a client that disconnects, so a cancellation is passed on as that.
"""

import asyncio

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send

DISCONNECT_TIMEOUT_S = 5.0
"""Time for the application to end its work after a disconnect, in seconds."""
# From spec version 2.4 on, Starlette's streams no longer listen for a disconnect; they wait for
# ``send`` to fail.
_ASGI = {"version": "3.0", "spec_version": "2.3"}


class CancelAsDisconnect:
    """Middleware that turns the cancellation of a call into a disconnect of its client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; a cancellation waits until it has ended its work."""
        client = _Client(receive, send)
        scope = {**scope, "asgi": _ASGI}
        task = asyncio.ensure_future(self._app(scope, client.receive, client.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            client.disconnect()
            try:
                await asyncio.wait((task,), timeout=DISCONNECT_TIMEOUT_S)
            finally:  # also if a second cancellation ends the wait
                task.cancel()
                task.add_done_callback(_retrieve_exception)
            raise


def _retrieve_exception(task: "asyncio.Future[None]") -> None:
    # asyncio logs exceptions that are never retrieved.
    if not task.cancelled():
        task.exception()


class _Client:
    """Channels to the client, which can simulate a disconnect."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._disconnected = asyncio.Event()

    def disconnect(self) -> None:
        self._disconnected.set()

    async def receive(self) -> Message:
        message = asyncio.ensure_future(self._receive())
        disconnect = asyncio.ensure_future(self._disconnected.wait())
        try:
            await asyncio.wait((message, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if self._disconnected.is_set():
                return {"type": "http.disconnect"}
            return message.result()
        finally:
            message.cancel()
            disconnect.cancel()

    async def send(self, message: Message) -> None:
        if not self._disconnected.is_set():
            await self._send(message)
