"""Streams on plain sockets, which the benchmark reads as it likes."""

import contextlib
import resource
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.token_times import EVENT

TIMEOUT_S = 240.0


def raise_file_limit() -> None:
    """Allow as many open files as possible, also in processes that are started later."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def open_streams(
    endpoint: Endpoint, body: Mapping[str, Any], num: int, buffer_bytes: int | None = None
) -> Iterator[list[socket.socket]]:
    """Open ``num`` connections and send a request on each; close them on exit.

    Args:
        endpoint: The server.
        body: Body of each request.
        num: Number of streams.
        buffer_bytes: Receive buffer of each connection; None: the system's default.
    """
    raise_file_limit()
    request = endpoint.encode_request("/v1/completions", body)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(socket.socket()) for _ in range(num)]
        for stream in streams:
            stream.settimeout(TIMEOUT_S)
            if buffer_bytes is not None:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            stream.connect((endpoint.host, endpoint.port))
            stream.sendall(request)
        yield streams


def read_first_token(stream: socket.socket) -> None:
    """Read until the first token has arrived.

    Raises:
        TargetError: The stream ended before.
    """
    received = b""
    while EVENT not in received:
        if not (data := stream.recv(65536)):
            raise TargetError(f"Stream ended early with {received[-400:]!r}")
        received += data
