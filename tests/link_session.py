r"""A session of a router with a replica over the link, and the recording of its frames.

    git worktree add /tmp/previous COMMIT
    PYTHONPATH=/tmp/previous .venv/bin/python -P tests/link_session.py record COMMIT \
        > tests/fixtures/link-session.json

records the frames of an earlier release. So this file uses only names that it had, too. ``replica``
instead of ``record`` serves one end on a free port, which is printed; ``router PORT [journals]`` is
the other.
"""

import asyncio
import json
import sys
import zlib
from typing import Any

import msgspec

from cluster.asgi import Receive, Scope, Send, journal_of, usage_of
from cluster.config import IdempotencyConfig
from cluster.errors import RequestError, UnavailableError
from cluster.gateway.pools.replica import ReplicaInfo
from cluster.link import (
    AnswerKey,
    AnswerStore,
    LinkClient,
    LinkServer,
    PrefixEvents,
    RequestHead,
    Resume,
    frames,
)
from cluster.link.frames import FrameDecoder
from cluster.load import Load

SECRET = b"the secret of the recorded session"
LOAD = Load(running=2, waiting=1, kv_cache_usage=0.5)
PREFIXES = (11, 12, 13)
PIECES = [b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n"]
ENTRIES = [b"first", b"second", b"third"]
HEADERS = [(b"content-type", b"application/json"), (b"x-request-id", b"id-1")]
KEY = AnswerKey(b"k" * 16, b"f" * 16)
REPLICA = ReplicaInfo(
    *("", "127.0.0.1", 4242, ("/v1/completions",), {"tandem": "0"}),
    adapters=("law",),
    resume_key="0123",
    keeps_answers=True,
    context_tokens=2048,
)
Session = list[dict[str, Any]]
"""Status, headers, body, usage counts and error of each request, as the router sees them."""


class Prefixes:
    """Prefix cache that never changes."""

    on_change: Any = None

    def take_events(self) -> PrefixEvents | None:
        return None

    def snapshot(self) -> tuple[int, ...]:
        return PREFIXES


async def replica(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the path says; journals have an entry per piece."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    usage, journal = usage_of(scope), journal_of(scope)
    usage.prompt_tokens, usage.completion_tokens = len(body), len(PIECES)
    if scope["path"] == "/fail":
        raise UnavailableError("not now", retry_after_s=3)
    headers = [(b"content-type", b"text/event-stream"), (b"x-path", scope["raw_path"])]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    earlier = journal.earlier if journal is not None else b""
    for entry, piece in zip(ENTRIES, PIECES, strict=True):
        if earlier.startswith(entry):
            earlier = earlier[len(entry) :]
        elif journal is not None:
            journal.add(entry)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
        if scope["path"] == "/hang":
            await asyncio.sleep(3600)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def start_server(port: int = 0) -> LinkServer:
    """Return a replica's end of the link, not started."""
    answers = AnswerStore(IdempotencyConfig())
    options: dict[str, Any] = {"load": lambda: LOAD, "prefixes": Prefixes(), "answers": answers}
    return LinkServer(replica, SECRET, port=port, resumes=True, **options)


def requests(*, with_journals: bool) -> list[tuple[RequestHead, bytes]]:
    """Return the requests of the session, in the order of their stream ids; journals come last."""
    full = RequestHead(
        method="POST",
        path="/v1/é",
        raw_path=b"/v1/%C3%A9",
        query_string=b"a=1",
        headers=HEADERS,
        request_id="id-0",
        scheme="https",
        client=("10.0.0.1", 5),
    )
    resume = Resume(len(ENTRIES[0]), len(PIECES[0]), zlib.crc32(PIECES[0]))
    journal: dict[str, Any] = {"keeps_journal": True}
    if hasattr(frames, "JOURNAL_FORMAT"):
        journal["journal_format"] = frames.JOURNAL_FORMAT
    journals = [
        (msgspec.structs.replace(full, **journal), b"x" * 200),
        (msgspec.structs.replace(full, **journal, resume=resume), ENTRIES[0] + b"{}"),
    ]
    return [
        (RequestHead(path="/v1/models"), b""),
        (full, b"{}"),
        (msgspec.structs.replace(full, answer_key=KEY), b"{}"),
        (msgspec.structs.replace(full, answer_key=KEY), b"{}"),
        (RequestHead(method="POST", path="/fail"), b"{}"),
        (RequestHead(method="POST", path="/hang"), b"{}"),
        *(journals if with_journals else []),
    ]


async def run_router(
    host: str, port: int, *, with_journals: bool = True
) -> tuple[Session, dict[str, Any]]:
    """Run the router's end; return the answers, and what the replica reported of itself."""
    reports: dict[str, Any] = {"prefixes": [], "answers": []}
    client = LinkClient(host, port, SECRET)
    client.on_prefixes = lambda events: reports["prefixes"].extend(events.stored)
    client.on_answers = lambda events: reports["answers"].extend(id_.hex() for id_ in events.added)
    await client.connect()
    try:
        session = [
            await _ask(client, head, body) for head, body in requests(with_journals=with_journals)
        ]
        load = client.load
        assert load is not None
        reports["load"] = [load.running, load.waiting, load.kv_cache_usage]
    finally:
        await client.close()
    return session, reports


async def _ask(client: LinkClient, head: RequestHead, body: bytes) -> dict[str, Any]:
    stream = client.open(head, body)
    seen: dict[str, Any] = {"body": ""}
    try:
        response = await stream.head()
        # Routers of later releases take further headers off.
        named = [(name.decode(), value.decode()) for name, value in response.headers]
        headers = [[name, value] for name, value in named if not name.startswith("x-tandem-")]
        seen |= {"status": response.status, "headers": headers}
        while piece := await stream.read():
            seen["body"] += piece.decode()
            if head.path == "/hang":
                ended = asyncio.Event()
                stream.on_finished = ended.set
                stream.cancel()
                await asyncio.wait_for(ended.wait(), 60)
                break
    except RequestError as error:
        seen["error"] = [error.status, error.message]
    usage = stream.usage
    seen["usage"] = None if usage is None else [usage.prompt_tokens, usage.completion_tokens]
    return seen


class Recorder:
    """TCP proxy that records the bytes of both directions."""

    def __init__(self) -> None:
        self.sent = {"router": bytearray(), "replica": bytearray()}

    async def start(self, port: int) -> tuple[str, int]:
        self._port = port
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(
            self._copy("router", reader, back_writer), self._copy("replica", back_reader, writer)
        )

    async def _copy(
        self, end: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            self.sent[end] += data
            writer.write(data)
        writer.close()

    def frames(self, end: str) -> list[list[Any]]:
        """Return what one end sent: stream id, kind, flags and payload (hex) of each frame."""
        decoded = FrameDecoder().feed(bytes(self.sent[end]))
        return [[stream, kind, flags, payload.hex()] for stream, kind, flags, payload in decoded]


async def record() -> dict[str, Any]:
    """Return the recording of a session between both ends of this release."""
    server = start_server()
    _, port = await server.start()
    recorder = Recorder()
    session, reports = await run_router(*(await recorder.start(port)))
    await server.stop()
    return {
        "session": session,
        "reports": reports,
        "router": recorder.frames("router"),
        "replica": recorder.frames("replica"),
        "metadata": REPLICA.to_metadata(),
    }


async def serve() -> None:
    """Run the replica's end until stdin is closed."""
    server = start_server()
    _, port = await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def main(mode: str, argument: str = "", journals: str = "") -> None:
    if mode == "replica":
        asyncio.run(serve())
    elif mode == "router":
        session = run_router("127.0.0.1", int(argument), with_journals=bool(journals))
        print(json.dumps(asyncio.run(session)))
    else:
        print(json.dumps({"commit": argument, **asyncio.run(record())}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
