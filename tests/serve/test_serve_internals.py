"""Ray Serve as ``serve_internals`` changes it: ports of the replicas and their HTTP server."""

import asyncio
import functools
import importlib.util
import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ports import free_ports
from cluster import ray_internals, serve_internals
from cluster.errors import RayIncompatibleError
from cluster.launch import environment
from cluster.router_sockets import open_router_socket, router_socket


def test_serve_reads_the_environment_variables_of_a_cluster() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    constants = Path(folder, "serve/_private/constants.py").read_text()
    variables = environment.cluster_environment({}, Path("/home"), "id", haproxy=True)
    unknown = [
        name for name in variables if name.startswith("RAY_SERVE_") and name not in constants
    ]
    assert unknown == []


# -- gRPC port of the replicas ----------------------------------------------------------------


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the gRPC server of a replica is bound to."""
    from ray.serve._private import replica

    bound: list[str] = []
    monkeypatch.setattr(
        replica, "add_port_to_grpc_server", lambda _, address: bound.append(address) or 7
    )
    return bound


@pytest.mark.parametrize(("value", "address"), [("0", "127.0.0.1:0"), ("1", "[::]:0")])
def test_a_replica_listens_on_loopback_if_the_cluster_does(
    value: str, address: str, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private import replica

    monkeypatch.setenv(ray_internals.LOOPBACK_VARIABLE, value)
    serve_internals.confine_replica_to_loopback()
    assert replica.add_port_to_grpc_server(object(), "[::]:0") == 7
    assert addresses == [address]


def test_a_replica_does_not_start_if_serve_opens_the_port_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ray_internals.LOOPBACK_VARIABLE, "0")
    monkeypatch.setattr(inspect, "getsource", lambda module: "server.add_insecure_port(address)")
    with pytest.raises(RayIncompatibleError, match="add_port_to_grpc_server") as caught:
        serve_internals.confine_replica_to_loopback()
    assert version("ray") in str(caught.value)


@pytest.mark.parametrize(("host", "expected"), [(None, "10.0.0.9"), ("0.0.0.0", "0.0.0.0")])
async def test_the_http_server_calls_the_wrapped_application(
    monkeypatch: pytest.MonkeyPatch, host: str | None, expected: str
) -> None:
    from ray.serve._private import replica
    from ray.serve.config import HTTPOptions

    started: list[Any] = []

    async def start(app: Any, options: Any, *, event_loop: Any) -> tuple[None, Any]:
        started.append((app, options, event_loop))
        return None, None

    monkeypatch.setattr(replica, "start_asgi_http_server", start)
    serve_internals.wrap_http_app(
        lambda app, has_middlewares: f"{app}, {has_middlewares}", host, None
    )
    await replica.start_asgi_http_server("app", HTTPOptions(host="10.0.0.9"), event_loop="loop")
    ((app, options, loop),) = started
    assert (app, options.host, loop) == ("app, False", expected, "loop")


@pytest.mark.parametrize("is_shared", [False, True])
async def test_the_http_server_listens_on_a_unix_socket_too(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_shared: bool,
) -> None:
    from ray.serve._private import replica
    from ray.serve.config import HTTPOptions

    (port,) = free_ports(1)
    path = router_socket(str(tmp_path), port)
    if is_shared:
        os.chmod(tmp_path, 0o777)
    open_socket = functools.partial(open_router_socket, str(tmp_path))
    monkeypatch.setattr(replica, "start_asgi_http_server", replica.start_asgi_http_server)
    serve_internals.wrap_http_app(lambda app, _: app, None, open_socket)
    options, loop = HTTPOptions(host="127.0.0.1", port=port), asyncio.get_running_loop()
    task, server = await replica.start_asgi_http_server(hello, options, event_loop=loop)
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await get(await asyncio.open_connection("127.0.0.1", port)) == b"hello"
    if is_shared:
        assert f"other users can replace files in {tmp_path}" in caplog.text
    else:
        assert await get(await asyncio.open_unix_connection(path)) == b"hello"
        assert caplog.text == ""
    server.should_exit = True
    await task
    with pytest.raises(FileNotFoundError if is_shared else ConnectionRefusedError):
        await asyncio.open_unix_connection(path)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


async def get(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
    reader, writer = streams
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]
