"""One request to an application in the same process, as a link would carry it, without a link."""

import asyncio
from collections.abc import AsyncGenerator

from cluster.asgi import ASGIApp, Message
from cluster.errors import InternalError
from cluster.link.exchange import scope_of
from cluster.link.frames import RequestHead, ResponseHead
from cluster.usage import Usage, UsageCounter

MAX_WAITING_BYTES = 256 * 1024
"""What the application may be ahead of the reader, and one chunk, before it has to wait."""
_ADDRESS = ("127.0.0.1", 0)


async def answer_locally(
    app: ASGIApp, head: RequestHead, body: bytes
) -> AsyncGenerator[ResponseHead | bytes | Usage, None]:
    """The response's head, its bytes with all that has come in one piece, and what it took.

    Closing the generator cancels the application.

    Raises:
        InternalError: the application ended without a response.
        Exception: what the application raised.
    """
    call = _LocalCall(body)
    scope = scope_of(head, call.usage, _ADDRESS, head.client or _ADDRESS)
    task = asyncio.ensure_future(app(scope, call.receive, call.send))
    task.add_done_callback(lambda _: call.news.set())
    try:
        head_due, chunks = True, b""
        while True:
            if head_due and call.head is not None:
                head_due = False
                yield call.head
            if chunks:
                yield chunks
            if task.done() and not call.waiting:
                break
            chunks = await call.take()
        await task
        if call.head is None:
            raise InternalError("the application ended without a response")
        if (said := call.usage.report()) is not None:
            yield said
    finally:
        task.cancel()


class _LocalCall:
    """What passes between an application and the reader of its answer."""

    def __init__(self, body: bytes) -> None:
        self.head: ResponseHead | None = None
        self.usage = UsageCounter()
        self.news = asyncio.Event()
        self._body: bytes | None = body
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._room = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """Whether something has come that was not taken."""
        return bool(self._chunks)

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Future()  # the task is cancelled when the reader leaves
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self.head = ResponseHead(message["status"], headers)
            self.news.set()
            return
        chunk = bytes(message.get("body", b""))
        self._chunks.append(chunk)
        self._num_bytes += len(chunk)
        self.news.set()
        while self._num_bytes > MAX_WAITING_BYTES:
            self._room.clear()
            await self._room.wait()

    async def take(self) -> bytes:
        """All that has come, waiting for news only if that is nothing."""
        if not self._chunks:
            await self.news.wait()
        self.news.clear()
        taken = b"".join(self._chunks)
        self._chunks.clear()
        self._num_bytes = 0
        self._room.set()
        return taken
