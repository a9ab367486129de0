"""Servers of the real HAProxy that change while a client keeps its connection."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from benchmarks.ports import free_ports
from cluster.haproxy_servers import server_comparison
from cluster.router_sockets import router_socket
from tests.serve.test_haproxy import running_haproxy

CONFIG = """
global
    stats socket {socket} mode 600 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend web
    bind 127.0.0.1:{port}
    default_backend routers
backend routers
    http-reuse always
    option httpchk GET /-/healthz
    default-server fastinter 250ms downinter 250ms inter 1s check
{servers}
backend other
    default-server inter 7s check
"""


def config(*servers: str, port: int = 1, socket: str = "s") -> str:
    lines = "\n".join(f"    server {server}" for server in servers)
    return CONFIG.format(servers=lines, port=port, socket=socket)


def test_only_changed_servers_are_changed() -> None:
    compare, _ = server_comparison()
    old = config("a 127.0.0.1:1 check", "b 127.0.0.1:2 check backup")
    assert compare(old, old) == ({}, [])
    added = "add server routers/c 127.0.0.1:3 check fastinter 250ms downinter 250ms inter 1s check"
    assert compare(old, config("b 127.0.0.1:2 check backup", "c 127.0.0.1:3 check")) == (
        {
            "routers/c": [
                (added, "New server registered."),
                ("enable server routers/c", ""),
                ("enable health routers/c", ""),
            ]
        },
        ["routers/a"],
    )


@pytest.mark.parametrize(
    "new",
    [
        config("a 127.0.0.1:1 check", port=2),
        config("a 127.0.0.1:2 check"),
        config("a 127.0.0.1:1 check backup"),
        config("a 127.0.0.1:1 check") + "backend new\n",
    ],
)
def test_other_changes_need_a_reload(new: str) -> None:
    assert server_comparison()[0](config("a 127.0.0.1:1 check"), new) is None


def test_a_backend_without_routers_is_noticed() -> None:
    _, is_emptied = server_comparison()
    full = config("a 127.0.0.1:1 check", "fallback 127.0.0.1:2 check backup")
    backup = config("fallback 127.0.0.1:2 check backup")
    assert is_emptied(full, backup)
    assert not is_emptied(full, config("b 127.0.0.1:3 check"))
    assert not is_emptied(backup, backup)
    assert not is_emptied(full, "defaults\n"), "the application was removed"


@contextlib.asynccontextmanager
async def router(name: str, directory: Path) -> AsyncIterator[int]:
    """Answer each request with ``name``, by TCP and a Unix socket; yield the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + name.encode())
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    local = await asyncio.start_unix_server(answer, router_socket(str(directory), port))
    try:
        yield port
    finally:
        server.close()
        local.close()


async def command(socket: Path, text: str) -> str:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(f"{text}\n".encode())
    answer = (await reader.read()).decode().strip()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("host", ["127.0.0.1", "unix@{folder}/router"])
async def test_a_kept_connection_outlives_the_replacement_of_all_routers(
    tmp_path: Path, host: str
) -> None:
    (port,) = free_ports(1)
    socket = tmp_path / "admin"
    host = host.format(folder=tmp_path)
    async with (
        router("a", tmp_path) as first,
        router("b", tmp_path) as second,
        httpx.AsyncClient() as http,
    ):
        old, new = (
            config(f"{name} {host}:{target} check", port=port, socket=str(socket))
            for name, target in (("a", first), ("b", second))
        )
        async with running_haproxy(tmp_path, old, port):
            changes = server_comparison()[0](old, new)
            assert changes is not None
            before = await http.get(f"http://127.0.0.1:{port}/")
            for line, expected in changes[0]["routers/b"]:
                assert await command(socket, line) == expected
            assert await command(socket, "set server routers/a state maint") == ""
            after = await http.get(f"http://127.0.0.1:{port}/")
            assert (before.text, after.text) == ("a", "b")
            streams = [each.extensions["network_stream"] for each in (before, after)]
            assert streams[0] is streams[1], "the client's connection was closed"
            deadline = time.monotonic() + 60  # HAProxy closes its idle connections in time
            while await command(socket, "del server routers/a") != "Server deleted.":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
