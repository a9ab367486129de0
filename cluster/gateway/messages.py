"""One request and one response inside the gateway, whichever way they came."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from cluster.admission import OPEN, Identity
from cluster.errors import InvalidRequestError, RequestError

Headers = list[tuple[bytes, bytes]]

MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request: it is read before it is admitted and never changed after."""

    id: str
    method: str
    path: str
    query: bytes
    headers: Headers
    """Names in lower case, as ASGI gives them."""
    body: bytes
    identity: Identity = OPEN
    """Who sent it."""

    @property
    def tenant(self) -> str:
        """The name of its tenant; "" where no key was asked for."""
        return self.identity.tenant.name


def header(headers: Headers, name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1")
    return None


class Body(Protocol):
    """Chunks of an answer; ``aclose`` ends it early and may be called at any time."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None:
        """End the answer here; nothing more is made of it."""


@dataclass(slots=True)
class Response:
    """An answer whose body may still be growing.

    Whoever takes it must exhaust or ``aclose`` the body: that is what frees the replica's place
    and cancels work that nobody waits for.
    """

    status: int
    headers: Headers
    body: Body


def request_id(given: str | None) -> str:
    """The caller's request id, or a new one where it gave none.

    Raises:
        InvalidRequestError: it is not fit to be logged and sent back.
    """
    if not given:
        return uuid4().hex
    if len(given) > MAX_REQUEST_ID_CHARS or not (given.isascii() and given.isprintable()):
        raise InvalidRequestError(
            f"x-request-id may have at most {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param="x-request-id",
        )
    return given


async def _once(chunk: bytes) -> AsyncGenerator[bytes, None]:
    yield chunk


def bytes_response(
    status: int, content_type: bytes, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Response:
    """A response whose body is complete."""
    length = str(len(body)).encode()
    base = [(b"content-type", content_type), (b"content-length", length)]
    return Response(status, [*base, *headers], _once(body))


def json_response(
    body: Any, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Response:
    """A complete JSON response."""
    encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return bytes_response(status, b"application/json", encoded, headers)


def error_response(error: RequestError) -> Response:
    """The HTTP form of a typed error."""
    extra = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    return json_response(error.body(), error.status, extra)
