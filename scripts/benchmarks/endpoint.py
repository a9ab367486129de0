"""Where a server answers, and one plain request to it over a raw socket."""

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import TandemError

END = b"\r\n0\r\n\r\n"
"""The last bytes of an answer in chunks."""


class TargetError(TandemError):
    """A server that is to be measured cannot be had, or answers wrongly."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server takes requests."""

    port: int
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """What each request needs: an API key."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    def answers(self, path: str) -> bool:
        """Whether it answers with 200."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("GET", path, headers=dict(self.headers))
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def request(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The bytes of a request that keeps its connection."""
        raw = json.dumps(body).encode()
        headers = {
            "host": f"{self.host}:{self.port}",
            "content-type": "application/json",
            "content-length": len(raw),
            **self.headers,
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + raw


def ask(endpoint: Endpoint, request: bytes, timeout_s: float = 60.0) -> bytes:
    """All bytes of a streamed answer.

    Raises:
        TargetError: there is none, or it is no answer in chunks with status 200.
    """
    answer = bytearray()
    try:
        with socket.create_connection((endpoint.host, endpoint.port), timeout_s) as connection:
            connection.sendall(request)
            while not answer.endswith(END):
                if not (data := connection.recv(65536)):
                    break
                answer += data
    except OSError as error:
        raise TargetError(f"{endpoint.url}: {error}") from None
    if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(END):
        raise TargetError(f"{endpoint.url} answered: {bytes(answer[:400])!r}")
    return bytes(answer)
