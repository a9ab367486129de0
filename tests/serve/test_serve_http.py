"""The gateway behind Ray Serve's HTTP server: unreadable headers, errors of Serve, uvicorn."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send
from cluster.gateway.serve_http import (
    ServeAdapter,
    end_http10_bodies_by_closing,
    offer_direct_writes,
)
from tests import asgi
from tests.serve.browser import listening
from tests.serve.gateway_kit import CHAT, World, gateway_world

HEADERS = (
    "x-session-id",
    "x-request-id",
    "x-request-timeout-seconds",
    "x-tandem-priority",
    "x-tandem-usage",
    "x-api-key",
    "authorization",
    "accept",
    "accept-language",
    "anthropic-beta",
    "anthropic-version",
    "baggage",
    "content-encoding",
    "content-type",
    "content-length",
    "cookie",
    "openai-beta",
    "serve_multiplexed_model_id",
    "traceparent",
    "tracestate",
    "user-agent",
    "x-request-disconnect-disabled",
    "x-unknown",
)


class FakeServe:
    """Serve's handling of a request: it decodes headers, obeys some, and sends plain texts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.obeyed: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.obeyed |= {name.encode() for name in headers if name.startswith("x-request-")}
        status = {"/timeout": 408, "/v1/messages/busy": 503}.get(scope["path"])
        if scope["path"] == "/defect":
            raise KeyError("secret internals")
        if status is None:
            await self._app(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": [(b"content-type", b"text/plain")]})
        text = b"Request 1 timed out after Nones."
        await send({"type": "http.response.body", "body": text})


def behind_serve(world: World) -> ServeAdapter:
    return ServeAdapter(FakeServe(world.app))


async def call_with(app: ASGIApp, name: bytes, value: bytes) -> asgi.Answer:
    call = asgi.start(app, "POST", CHAT, {"model": "gen"}, {name.decode("latin-1"): ""})
    call.scope["headers"] = [
        *((key, old) for key, old in call.scope["headers"] if key != name.lower()),
        (name, value),
    ]
    return await call.done()


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("value", [b"\xe9", b"\xff\xfe", b"\xb2", "Grüße 🎉".encode(), b"9" * 5000])
async def test_header_bytes_above_0x7f_are_passed_or_get_400(name: str, value: bytes) -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        answer = await call_with(behind_serve(world), name.encode(), value)
        assert answer.status in (200, 400), answer.body
        assert answer.headers["content-type"] == "application/json"
        answer.json()


@given(name=st.binary(min_size=1, max_size=20), value=st.binary(max_size=60))
def test_any_header_is_passed_or_gets_400(name: bytes, value: bytes) -> None:
    async def check() -> None:
        async with gateway_world() as world:
            await world.add("gen", "gen-1")
            assert (await call_with(behind_serve(world), name, value)).status in (200, 400, 413)

    asyncio.run(check())


@pytest.mark.parametrize(
    "target",
    ["/caf\xe9", "/v1/models/\xff", "/v1/models/%ff%fe", "/v1/models/%00", "/nowhere?\xe9=%ff"],
)
async def test_any_path_and_query_get_an_error_in_the_format_of_the_api(target: str) -> None:
    async with gateway_world() as world, listening(behind_serve(world)) as url:
        await world.add("gen", "gen-1")
        head, body = await exchange(url, f"GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close")
        assert b" 404 " in head or b" 400 " in head
        if b"json" in head:
            assert json.loads(body)["error"]["code"] == 404


async def test_serve_obeys_no_header_of_a_client() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        serve = FakeServe(world.app)
        headers = {"X-Request-Timeout-Seconds": "5", "x-request-disconnect-disabled": "?1"}
        answer = await asgi.post(ServeAdapter(serve), CHAT, {}, headers=headers)
        assert answer.status == 200
        assert serve.obeyed == set()


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [("/timeout", 408, "timed out"), ("/v1/messages/busy", 503, "timed out"), ("/defect", 500, "")],
)
async def test_errors_of_serve_have_the_format_of_the_api(
    path: str, status: int, says: str
) -> None:
    async with gateway_world() as world:
        answer = await asgi.post(behind_serve(world), path, {})
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert says in error["message"]
        assert "secret" not in error["message"]
        assert ("type" in answer.json()) == path.startswith("/v1/messages")


# -- uvicorn ----------------------------------------------------------------------------------


@pytest.fixture
def routers_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    from uvicorn.protocols.http import httptools_impl

    cycle = httptools_impl.RequestResponseCycle
    monkeypatch.setattr(httptools_impl, "RequestResponseCycle", cycle)  # restored at the end
    end_http10_bodies_by_closing()
    offer_direct_writes()


NUM_EVENTS, FILLER = 4096, b": " + b"x" * 4096 + b"\n\n"


async def long_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Stream 16 MiB of numbered events."""
    await receive()
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(NUM_EVENTS):
        body = b"data: %d\n\n" % number + FILLER
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.usefixtures("routers_uvicorn")
@pytest.mark.parametrize("middleware", [False, True])
async def test_direct_writes_keep_the_order_if_the_client_reads_slowly(
    monkeypatch: pytest.MonkeyPatch, middleware: bool
) -> None:
    seen: list[int] = []

    async def adapted(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting_send(message: Message) -> None:
            seen.append(len(message.get("body", b"")))
            await send(message)

        await ServeAdapter(world.app, writes_directly=not middleware)(scope, receive, noting_send)

    async with gateway_world() as world, listening(adapted) as url:
        await world.serve(long_answer, "gen", "gen-1", (CHAT,))
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        content = json.dumps({"model": "gen", "stream": True})
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
        await asyncio.sleep(0.3)  # the buffers fill up
        body = b""
        while (line := await reader.readline()) != b"\r\n":
            assert line
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        writer.close()
    assert body == b"".join(b"data: %d\n\n" % number + FILLER for number in range(NUM_EVENTS))
    assert (sum(seen) == len(body)) is middleware


async def exchange(url: str, head: str, body: str = "") -> tuple[bytes, bytes]:
    """Send a request; return head and body of the response until the connection closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{head}\r\n\r\n{body}".encode("latin-1"))
        data = await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()
    answer, _, rest = data.partition(b"\r\n\r\n")
    return answer.lower(), rest


@pytest.mark.usefixtures("routers_uvicorn")
@pytest.mark.parametrize("fields", [{"stream": 3}, {}, {"model": "unknown"}])
async def test_http10_clients_get_no_chunks(fields: dict[str, Any]) -> None:
    async with gateway_world() as world, listening(world.app) as url:
        await world.add("gen", "gen-1")
        content = json.dumps(fields)
        lines = f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(content)}"
        head, body = await exchange(url, lines, content)
        assert b"transfer-encoding" not in head
        if fields.get("stream"):
            assert body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
        else:
            json.loads(body)


@pytest.mark.usefixtures("routers_uvicorn")
async def test_http11_clients_still_get_chunks() -> None:
    async with gateway_world() as world, listening(world.app) as url:
        await world.add("gen", "gen-1")
        lines = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 13"
        head, body = await exchange(url, lines, '{"stream": 3}')
        assert b"transfer-encoding: chunked" in head
        assert body.endswith(b"0\r\n\r\n")
