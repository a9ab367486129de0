"""HTTP servers of Serve wake up less often, and still end and tell the time."""

import asyncio

import pytest
import uvicorn

from cluster import ray_internals


async def hello(scope: object, receive: object, send: object) -> None:
    raise AssertionError("no request is sent")


async def test_a_server_ticks_rarely_and_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "on_tick", uvicorn.Server.on_tick)
    pauses: list[float] = []
    server = uvicorn.Server(uvicorn.Config(hello, port=0, lifespan="off"))

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        server.should_exit = len(pauses) == 4

    ray_internals.server_rest()()
    ray_internals.server_rest()()  # changes nothing
    server.config.load()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await server.main_loop()
    rest_s = ray_internals.SERVER_REST_S
    assert pauses == [0.1, rest_s, 0.1, rest_s]
    assert server.server_state.default_headers[0][0] == b"date"
