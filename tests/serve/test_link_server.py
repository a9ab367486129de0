"""The link's server: load, limits, drain, and Starlette as its application."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.asgi import Receive, Scope, Send
from cluster.errors import LinkClosedError, UnavailableError
from cluster.link import LinkClient, LinkOptions, LinkServer, LinkState, RequestHead
from cluster.load import Load
from tests.serve.link_kit import (
    SECRET,
    ask,
    echo,
    hang,
    linked,
    on_both_loops,
    read_all,
    send_body,
    send_head,
    until,
)


@on_both_loops
async def test_traffic_is_counted_on_both_ends() -> None:
    async with linked(echo) as (server, client):
        await ask(client, body=b"x" * 1000)
        assert client.counts.connects == server.counts.connects == 1
        assert client.counts.frames_received >= 2  # RESPONSE, DATA
        assert client.counts.bytes_received > 1000
        assert client.counts.bytes_sent == server.counts.bytes_received > 1000
        assert client.counts.frames_sent == server.counts.frames_received >= 2  # REQUEST, BODY


@on_both_loops
async def test_the_load_is_sent_when_it_changes() -> None:
    running = 1
    seen: list[Load] = []
    options = LinkOptions(load_interval_s=0)
    load = lambda: Load(running=running, kv_cache_usage=0.5)  # noqa: E731
    async with linked(hang, options=options, load=load) as (_, client):
        client.on_load = seen.append
        await until(lambda: client.load == Load(1, 0, 0.5, 0))
        stream = client.open(RequestHead())
        await until(lambda: client.load == Load(1, 0, 0.5, 1))
        running = 5  # no frame is due; the heartbeat sends the load
        await until(lambda: client.load == Load(5, 0, 0.5, 1))
        stream.cancel()
        await until(lambda: client.load == Load(5, 0, 0.5, 0))
        assert seen[-1] == client.load


@on_both_loops
async def test_drain_finishes_open_streams_and_refuses_new_ones() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_head(send)
        if scope["path"] == "/hang":
            await asyncio.Future()
        await go_on.wait()
        await send_body(send, b"finished" * 10_000, more=False)

    async with linked(app) as (server, client):
        streams = [client.open(RequestHead(path=path)) for path in ("/", "/", "/hang")]
        for stream in streams:
            await stream.head()
        drain = asyncio.create_task(server.drain(0.3))
        raced = None
        while client.connected:
            raced = client.open(RequestHead())  # some are in transit when the drain begins
            await asyncio.sleep(0)
        assert client.state.value == "draining"
        with pytest.raises(LinkClosedError, match="draining"):
            client.open(RequestHead())
        if raced is not None:
            with pytest.raises(LinkClosedError, match="drains"):
                await raced.head()
        go_on.set()
        assert await drain == (2, 1)
        assert [await read_all(stream) for stream in streams[:2]] == [b"finished" * 10_000] * 2
        with pytest.raises(UnavailableError):
            await streams[2].read()
        assert server.num_streams == 0


@on_both_loops
async def test_finish_refuses_new_streams_and_keeps_the_connection() -> None:
    """A router must not take a replica whose engine has died for one that has no link."""
    async with linked(hang) as (server, client):
        await client.open(RequestHead()).head()
        assert await server.finish(0.1) == (0, 1)
        await until(lambda: client.state.value == "draining")
        await asyncio.sleep(0.3)  # longer than a new attempt to connect would take
        assert client.state.value == "draining"
        assert client.failures == 0
        with pytest.raises(LinkClosedError, match="draining"):
            client.open(RequestHead())


@on_both_loops
async def test_streams_over_the_limit_are_refused() -> None:
    async with linked(hang, options=LinkOptions(max_streams=2)) as (_, client):
        streams = [client.open(RequestHead()) for _ in range(3)]
        with pytest.raises(LinkClosedError, match="too many"):
            await streams[2].head()
        assert (await streams[1].head()).status == 200


@on_both_loops
async def test_starlette_with_middleware_streams_and_stops_on_cancel() -> None:
    stepping, stopped = asyncio.Event(), asyncio.Event()

    async def tokens() -> AsyncIterator[str]:
        try:
            for number in range(3):
                yield f"data: {number}\n\n"
            stepping.set()
            await asyncio.Future()  # like an engine between two tokens
        finally:
            stopped.set()

    async def stream(request: Request) -> Response:
        return StreamingResponse(tokens(), media_type="text/event-stream")

    async def json(request: Request) -> Response:
        return JSONResponse({"got": await request.json(), "q": request.query_params["q"]})

    async def through(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    app = Starlette(
        routes=[Route("/stream", stream), Route("/json", json, methods=["POST"])],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=through)],
    )
    async with linked(app) as (server, client):
        head = RequestHead(method="POST", path="/json", query_string=b"q=1")
        assert await read_all(client.open(head, b"[1]")) == b'{"got":[1],"q":"1"}'
        assert (await ask(client, "/nowhere"))[0] == 404
        async with client.open(RequestHead(path="/stream")) as response:
            assert (await response.head()).status == 200
            assert (await response.read()).startswith(b"data: 0\n\n")
            await stepping.wait()
        await stopped.wait()
        await until(lambda: server.num_streams == 0)


@on_both_loops
async def test_stop_is_safe_before_start_and_twice() -> None:
    server = LinkServer(echo, b"x")
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()


@on_both_loops
async def test_a_retired_server_refuses_streams_and_keeps_connections() -> None:
    async with linked(hang) as (server, client):
        stream = client.open(RequestHead())
        assert await stream.read() == b"!"
        server.retire()
        await until(lambda: client.state is LinkState.DRAINING)
        with pytest.raises(LinkClosedError):
            client.open(RequestHead())
        late = LinkClient(*server.address, SECRET)
        late.start()
        await until(lambda: late.state is LinkState.DRAINING)
        assert late.failures == client.failures == 0
        assert server.num_streams == 1
        await late.close()
