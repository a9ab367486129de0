"""Lets a cancel reach work that an ASGI application runs in tasks of its own.

vLLM's handlers of whole answers run in such tasks: cancelling the caller leaves them computing.
What they do heed is a client that leaves, so a cancel is told to them as that.
"""

import asyncio

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send

LEAVE_TIMEOUT_S = 5.0
_ASGI = {"version": "3.0", "spec_version": "2.3"}
"""From 2.4 on, Starlette's streams wait for a failing ``send`` and no longer listen."""


class CancelAsLeave:
    """``app``, for which the cancel of a call is the client's leaving."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run ``app``; a cancel returns when ``app`` has ended its work."""
        client = _Client(receive, send)
        scope = {**scope, "asgi": _ASGI}
        task = asyncio.ensure_future(self._app(scope, client.receive, client.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            client.leave()
            try:
                await asyncio.wait((task,), timeout=LEAVE_TIMEOUT_S)
            finally:  # also where a second cancel ends the wait
                task.cancel()
                task.add_done_callback(_forget)
            raise


def _forget(task: "asyncio.Future[None]") -> None:
    """Take note of how it ended, of which nobody is left to hear."""
    if not task.cancelled():
        task.exception()


class _Client:
    """The two channels to a client, which can be told that it left."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        coming = asyncio.ensure_future(self._receive())
        leaving = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self._left.is_set() else coming.result()
        finally:
            coming.cancel()
            leaving.cancel()

    async def send(self, message: Message) -> None:
        if not self._left.is_set():
            await self._send(message)
