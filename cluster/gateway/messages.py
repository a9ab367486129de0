"""Requests and responses inside the gateway, over HTTP or links."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import parse_qsl
from uuid import uuid4

from cluster.admission import OPEN, Identity
from cluster.asgi import Receive
from cluster.config.guards import GuardOutcome
from cluster.errors import (
    InvalidRequestError,
    PermissionDeniedError,
    RequestError,
    RequestTimeoutError,
)
from cluster.gateway.error_formats import error_body
from cluster.link import AnswerKey
from cluster.usage import Usage

Headers = list[tuple[bytes, bytes]]

MAX_REQUEST_ID_CHARS = 128
_EMPTY_OBJECT = re.compile(rb"\s*\{\s*\}\s*")
KEPT_BODY_BYTES = 8000
"""Part of a body that is kept for the request log: 2,000 characters of at most 4 bytes."""


@dataclass(slots=True)
class GuardNotes:
    """Results of the guards of one request, for its answer and its records."""

    outcomes: dict[str, GuardOutcome] = field(default_factory=dict)
    """Results by guard, without those that passed."""
    status: int | None = None
    """Status to record if the guards cancel the request; None: that of a disconnect."""

    def __str__(self) -> str:
        return ", ".join(f"{guard}={outcome}" for guard, outcome in self.outcomes.items())


@dataclass(slots=True)
class Request:
    """A complete request, body included; only ``release_body`` changes it."""

    id: str
    method: str
    path: str
    query: bytes
    headers: Headers
    """Names are in lower case, as in ASGI."""
    body: bytes
    identity: Identity = OPEN
    """Sender, by API key."""
    model: str | None = None
    """Model that the path named; see ``split_model_path``."""
    is_cancelled: Callable[[], bool] = bool
    """Returns True if the client has cancelled it, False if it may have lost its connection."""
    answer_key: AnswerKey | None = None
    """Set if the client may repeat the request and get the same answer."""
    is_copy: bool = False
    """True for a copy whose answer is discarded, and for a guard's check; it is not charged."""
    arrived_s: float | None = None
    """Time (``perf_counter``) before guards checked the request; None if none do."""
    guard_notes: GuardNotes | None = None
    """Results of the guards that check the request; None if there are none."""
    stream: "BodyStream | None" = None
    """Body that its handler reads piece by piece; ``body`` is then empty."""
    on_usage: Callable[[Usage], None] | None = None
    """Set if the request is a line of a batch: called with its usage, before the answer ends."""
    on_slot: Callable[[], None] | None = None
    """Called when the request gets a slot at a replica, at each attempt."""

    @property
    def is_batch_line(self) -> bool:
        """True for a line of a batch, which leaves the engines to other requests."""
        return self.on_usage is not None

    @property
    def tenant(self) -> str:
        """Name of the sender's tenant; empty if no keys are configured."""
        return self.identity.tenant.name

    def release_body(self) -> None:
        """Drop the body once no replica will need it; its beginning stays for the request log."""
        self.body = self.body[:KEPT_BODY_BYTES]


class BodyStream:
    """Body of a request that is not buffered.

    Args:
        receive: ASGI's function of that name.
        stall_timeout_s: Maximum time without progress, in seconds.
    """

    def __init__(self, receive: Receive, stall_timeout_s: float) -> None:
        self.is_complete = False
        """True once the whole body was read."""
        self._receive = receive
        self._stall_timeout_s = stall_timeout_s

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body.

        Raises:
            RequestTimeoutError: The client stalls.
            ConnectionResetError: It has disconnected.
        """
        while not self.is_complete:
            try:
                async with asyncio.timeout(self._stall_timeout_s):
                    message = await self._receive()
            except TimeoutError:
                raise RequestTimeoutError(
                    f"The client sent nothing for {self._stall_timeout_s:g} s."
                ) from None
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client disconnected during its upload")
            self.is_complete = not message.get("more_body", False)
            yield message.get("body", b"")


def require_operator(request: Request, what: str) -> None:
    """Raise PermissionDeniedError unless the key is an operator's; ``what`` is what needs it."""
    if not request.identity.sees_all:
        raise PermissionDeniedError(f"{what} needs an operator key.")


def query_of(request: Request) -> dict[str, str]:
    """Return the parameters of the query string, also empty ones; the last of each name."""
    return dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))


def header(headers: Headers, name: bytes) -> str | None:
    """Return the first header with this lower-case name."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1")
    return None


def with_json_fields(request: Request, fields: Mapping[str, str | int]) -> Request:
    """Return the request with fields in its JSON body, instead of the client's values if any.

    Parsers take the last of duplicate fields, so the body is not decoded, and copied only once.
    """
    end = request.body.rfind(b"}")
    if not fields or end < 0 or request.body[end + 1 :].strip():
        return request
    comma = b"" if _EMPTY_OBJECT.fullmatch(request.body) else b","
    added = json.dumps(fields, separators=(",", ":")).encode()[1:]
    return with_body(request, b"".join((memoryview(request.body)[:end], comma, added)))


def with_body(request: Request, body: bytes) -> Request:
    """Return the request with another body."""
    headers = [pair for pair in request.headers if pair[0] != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    return replace(request, headers=headers, body=body)


class Body(Protocol):
    """Chunks of a response's body."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None:
        """Cancel the rest of the body; may be called at any time."""


@dataclass(slots=True)
class Response:
    """A response whose body may still be growing.

    Its receiver must exhaust or ``aclose`` the body: only that releases the slot at the replica.
    """

    status: int
    headers: Headers
    body: Body


def request_id(client_id: str | None) -> str:
    """Return the client's request id, or a new one if it sent none.

    Raises:
        InvalidRequestError: The id is too long, or not printable ASCII.
    """
    if not client_id:
        return uuid4().hex
    is_printable = client_id.isascii() and client_id.isprintable()
    if len(client_id) > MAX_REQUEST_ID_CHARS or not is_printable:
        raise InvalidRequestError(
            f"x-request-id must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param="x-request-id",
        )
    return client_id


async def _single_chunk(chunk: bytes) -> AsyncGenerator[bytes, None]:
    yield chunk


def bytes_response(
    status: int, content_type: bytes, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Response:
    """Return a response with a complete body."""
    length = str(len(body)).encode()
    base = [(b"content-type", content_type), (b"content-length", length)]
    return Response(status, [*base, *headers], _single_chunk(body))


def empty_response(status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> Response:
    """Return a response without a body."""
    return Response(status, list(headers), _single_chunk(b""))


def json_response(
    body: Any, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Response:
    """Return a response with a JSON body."""
    encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return bytes_response(status, b"application/json", encoded, headers)


def error_response(error: RequestError, path: str) -> Response:
    """Return the HTTP form of an error in the format of the API at ``path``."""
    extra = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    return json_response(error_body(path, error), error.status, extra)
