"""Requests to an application in the same process, without a link."""

import asyncio
from collections.abc import AsyncGenerator

from cluster.asgi import ASGIApp, Message
from cluster.errors import InternalError
from cluster.link.frames import RequestHead, ResponseHead
from cluster.link.server_stream import request_scope, response_head
from cluster.usage import Usage, UsageCounter

MAX_UNREAD_BYTES = 256 * 1024
"""Bytes by which an application may be ahead of its readers before ``send`` waits."""
_LOCAL_ADDRESS = ("127.0.0.1", 0)


async def answer_locally(
    app: ASGIApp, head: RequestHead, body: bytes
) -> AsyncGenerator[ResponseHead | bytes | Usage, None]:
    """Yield an application's response: its head, its body in pieces, and its usage if known.

    Each piece is everything that has been sent since the last one. Closing the generator cancels
    the application.

    Raises:
        InternalError: the application ended without a response.
        Exception: any exception of the application.
    """
    call = _LocalCall(body)
    scope = request_scope(head, call.usage, _LOCAL_ADDRESS, head.client or _LOCAL_ADDRESS)
    task = asyncio.ensure_future(app(scope, call.receive, call.send))
    task.add_done_callback(call.on_task_done)
    try:
        head_sent, chunks = False, b""
        while True:
            if not head_sent and call.head is not None:
                head_sent = True
                yield call.head
            if chunks:
                yield chunks
            if task.done() and not call.chunks:
                break
            chunks = await call.read()
        await task
        if call.head is None:
            raise InternalError("the application ended without a response")
        if (usage := call.usage.report()) is not None:
            yield usage
    finally:
        task.cancel()


class _LocalCall:
    """ASGI messages between an application and the reader of its response."""

    def __init__(self, body: bytes) -> None:
        self.head: ResponseHead | None = None
        self.usage = UsageCounter()
        self.changed = asyncio.Event()
        self._body: bytes | None = body
        self.chunks: list[bytes] = []  # not read yet
        self._num_bytes = 0
        self._has_room = asyncio.Event()

    def on_task_done(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled():
            task.exception()  # a reader that left does not ask for it, and asyncio would log it
        self.changed.set()

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Future()  # the task is cancelled when the reader closes the generator
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.head = response_head(message)
            self.changed.set()
            return
        chunk = bytes(message.get("body", b""))
        self.chunks.append(chunk)
        self._num_bytes += len(chunk)
        self.changed.set()
        while self._num_bytes > MAX_UNREAD_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    async def read(self) -> bytes:
        """Return everything that was sent since the last call, waiting if that is nothing."""
        if not self.chunks:
            await self.changed.wait()
        self.changed.clear()
        data = b"".join(self.chunks)
        self.chunks.clear()
        self._num_bytes = 0
        self._has_room.set()
        return data
