"""One HTTP request and its response over ASGI, as the endpoints see it."""

import random
import time
from struct import Struct
from typing import Any

from cluster.asgi import Scope, Send, journal_of, usage_of
from cluster.engines.sim.wire import dumps, random_id

_CREATED = Struct("<d")
_ENTRY = Struct("<H")


class HttpExchange:
    """A request with its whole body, and methods to respond."""

    __slots__ = (
        *("_journal", "_request_id", "_send", "body", "content_type", "created_s"),
        *("earlier", "is_streaming", "model", "path", "usage"),
    )

    def __init__(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = dict(scope["headers"])
        self.path: str = scope["path"]
        self.body = body
        self.content_type = headers.get(b"content-type", b"").decode("latin-1")
        self.model = ""
        """Model or adapter that responds; empty until it is checked."""
        self.is_streaming = False
        """True once a stream has started."""
        self.usage = usage_of(scope)
        self._request_id: bytes | None = headers.get(b"x-request-id")
        self._send = send
        self._journal = journal = journal_of(scope)
        self.created_s = time.time()
        """Unix time at which the answer began, at this or an earlier replica."""
        self.earlier: list[int] = []
        """Indices of the sequences whose tokens an earlier replica passed on, in order."""
        if journal is not None and journal.earlier:
            (self.created_s,) = _CREATED.unpack_from(journal.earlier)
            entries = journal.earlier[_CREATED.size :]
            self.earlier = [index for (index,) in _ENTRY.iter_unpack(entries)]
        elif journal is not None:
            journal.add(_CREATED.pack(self.created_s))

    def record_token(self, index: int) -> None:
        """Note that a token of a sequence is passed on."""
        if self._journal is not None:
            self._journal.add(_ENTRY.pack(index))

    def item_id(self) -> str:
        """Return 16 hexadecimal digits, the same in every replica that gives this answer."""
        return f"{random.Random(self.created_s).getrandbits(64):016x}"

    def new_id(self, prefix: str) -> str:
        """Return an id for the response: the request's ``x-request-id``, or a random one."""
        request_id = self._request_id
        return prefix + (random_id() if request_id is None else request_id.decode("latin-1"))

    async def reply(self, status: int, body: Any, *headers: tuple[bytes, bytes]) -> None:
        raw = dumps(body)
        length = (b"content-length", str(len(raw)).encode())
        await self._start(status, length, (b"content-type", b"application/json"), *headers)
        await self._send({"type": "http.response.body", "body": raw, "more_body": False})

    async def start_stream(self) -> None:
        self.is_streaming = True
        await self._start(200, (b"content-type", b"text/event-stream; charset=utf-8"))

    async def write(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        echoed = (b"x-request-id", self._request_id or random_id().encode())
        start = {"type": "http.response.start", "status": status, "headers": [*headers, echoed]}
        await self._send(start)
