"""ASGI client without a server that keeps each body chunk and can disconnect early.

httpx's ASGI transport joins the body before it returns, so it shows neither the chunks of a stream
and their order in time nor a disconnect.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster.asgi import WRITE, ASGIApp, Message


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str | None, str]]:
        """Return the server-sent events as (event name, data)."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line.split(": ", 1) for line in block.splitlines() if ": " in line]
            fields = dict(lines)
            if "data" in fields:
                found.append((fields.get("event"), fields["data"]))
        return found

    def data(self) -> list[Any]:
        """Return the parsed data of each event except the final ``[DONE]``."""
        return [json.loads(data) for _, data in self.events() if data != "[DONE]"]


class Call:
    """One request in flight: ``await call.done()``, ``call.disconnect()`` or ``call.cancel()``."""

    def __init__(self, app: ASGIApp, scope: dict[str, Any], body: bytes) -> None:
        self.answer = Answer()
        self.scope = scope
        """Scope of the request, which begins once the event loop runs."""
        self._body: bytes | None = body
        self._disconnected = asyncio.Event()
        self._changed = asyncio.Event()
        self._num_offered = 0
        scope["extensions"][WRITE] = self._write
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))
        self.task.add_done_callback(self._end)

    def _end(self, _: asyncio.Future[None]) -> None:
        self.scope["extensions"].pop(WRITE, None)  # it refers to this object: they would be a cycle
        self._changed.set()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {
                key.decode("latin-1").lower(): value.decode("latin-1")
                for key, value in message.get("headers", [])
            }
        else:
            if body := message.get("body", b""):
                self.answer.chunks.append(body)
            self.answer.ended = not message.get("more_body", False)
        self._changed.set()

    def _write(self, piece: bytes) -> bool:
        """Take a piece of the body; refuse every third one, as a server with a slow client does."""
        self._num_offered += 1
        if self._num_offered % 3 == 0:
            return False
        self.answer.chunks.append(piece)
        self._changed.set()
        return True

    async def done(self, timeout_s: float = 60.0) -> Answer:
        await asyncio.wait_for(asyncio.shield(self.task), timeout_s)
        return self.answer

    async def chunks(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until ``count`` chunks have arrived, or the response has ended."""
        async with asyncio.timeout(timeout_s):
            while len(self.answer.chunks) < count and not self.task.done():
                self._changed.clear()
                await self._changed.wait()

    def disconnect(self) -> None:
        """Disconnect: the application receives ``http.disconnect``, as from a server."""
        self._disconnected.set()

    async def cancel(self) -> None:
        """Cancel the task that runs the application."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


def start(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Call:
    """Start a request; ``body`` is sent as JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    path, _, query = path.partition("?")
    sent = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
        "extensions": {},
    }
    return Call(app, scope, raw)


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 60.0,
) -> Answer:
    """Send a request and wait for the complete response."""
    return await start(app, method, path, body, headers).done(timeout_s)


async def post(app: ASGIApp, path: str, body: Any, **kwargs: Any) -> Answer:
    return await call(app, "POST", path, body, **kwargs)


async def get(app: ASGIApp, path: str, **kwargs: Any) -> Answer:
    return await call(app, "GET", path, **kwargs)


async def check_health_repeatedly(engine: Any, timeout_s: float = 60.0) -> None:
    """Check the health of an engine until that raises, as Serve does."""
    async with asyncio.timeout(timeout_s):
        while True:
            await engine.check_health()
            await asyncio.sleep(0.02)
