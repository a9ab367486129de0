"""One HTTP request and its answer over ASGI, as the endpoints see it."""

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.asgi import Receive, Scope, Send, usage_of
from cluster.config import GeneratorConfig
from cluster.engines.sim.generation import Generation
from cluster.engines.sim.wire import dumps, random_id


class Host(Protocol):
    """What the endpoints need of the engine."""

    config: GeneratorConfig
    max_model_len: int

    def submit(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        stop: Sequence[str],
        exchange: "Exchange",
    ) -> Generation:
        """Accept the prompts of one request, whose tokens are counted in its ``usage``."""

    def discard(self, generation: Generation) -> None:
        """Forget them."""


class Exchange:
    """A request whose body has come, and the means to answer it."""

    __slots__ = (
        *("_request_id", "_send", "body", "content_type", "model", "path", "streaming"),
        "usage",
    )

    def __init__(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = dict(scope["headers"])
        self.path: str = scope["path"]
        self.body = body
        self.content_type = headers.get(b"content-type", b"").decode("latin-1")
        self.model = ""
        """The model or adapter that answers, once that is known."""
        self.streaming = False
        self.usage = usage_of(scope)
        self._request_id: bytes | None = headers.get(b"x-request-id")
        self._send = send

    def new_id(self, prefix: str) -> str:
        """The answer's id: the caller's ``x-request-id`` where there is one."""
        given = self._request_id
        return prefix + (random_id() if given is None else given.decode("latin-1"))

    async def reply(self, status: int, body: Any, *headers: tuple[bytes, bytes]) -> None:
        """Answer with JSON."""
        raw = dumps(body)
        length = (b"content-length", str(len(raw)).encode())
        await self._begin(status, length, (b"content-type", b"application/json"), *headers)
        await self._send({"type": "http.response.body", "body": raw, "more_body": False})

    async def begin_stream(self) -> None:
        """Answer with server-sent events; ``write`` gives them."""
        self.streaming = True
        await self._begin(200, (b"content-type", b"text/event-stream; charset=utf-8"))

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the stream."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end_stream(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        echoed = (b"x-request-id", self._request_id or random_id().encode())
        start = {"type": "http.response.start", "status": status, "headers": [*headers, echoed]}
        await self._send(start)


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None: the client left before it was complete."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
