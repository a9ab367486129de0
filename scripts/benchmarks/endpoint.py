"""Address of a server under test, and one plain request to it over a raw socket."""

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import TandemError

LAST_CHUNK = b"\r\n0\r\n\r\n"
"""Last bytes of a response with chunked transfer encoding."""


class TargetError(TandemError):
    """Target that cannot be started or that sends a wrong response."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address, model and headers for requests to a server."""

    port: int
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of every request, such as an API key."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def returns_ok(self, path: str) -> bool:
        """Return True if a GET of ``path`` returns 200."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("GET", path, headers=dict(self.headers))
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def encode_request(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Return the bytes of a POST request that keeps its connection open."""
        raw = json.dumps(body).encode()
        headers = {
            "host": f"{self.host}:{self.port}",
            "content-type": "application/json",
            "content-length": len(raw),
            **self.headers,
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + raw


def send_request(endpoint: Endpoint, request: bytes, timeout_s: float = 60.0) -> bytes:
    """Send a request and return all bytes of its chunked response.

    Raises:
        TargetError: There is no complete chunked response with status 200.
    """
    response = bytearray()
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout_s) as connection:
            connection.sendall(request)
            while not response.endswith(LAST_CHUNK):
                if not (data := connection.recv(65536)):
                    break
                response += data
    except OSError as error:
        raise TargetError(f"{endpoint.url}: {error}") from None
    if not response.startswith(b"HTTP/1.1 200 ") or not response.endswith(LAST_CHUNK):
        raise TargetError(f"{endpoint.url} sent an invalid response: {bytes(response[:400])!r}")
    return bytes(response)
