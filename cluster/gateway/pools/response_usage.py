"""Usage of a request in its response: the object ``usage.tandem``.

A response is returned as the engine wrote it unless the request sets ``x-tandem-usage: 1``. Then a
JSON response is held until it is complete and gets ``usage.tandem``, and a stream gets one more
event after its last, ``tandem.usage``. ``accounting.in_answers`` adds it to all JSON responses.
"""

import json
from typing import Any, Protocol, cast

from cluster.accounting import REASONS
from cluster.errors import InvalidRequestError, LinkError, ReplicaLostError
from cluster.gateway.messages import Body, Request, Response, bytes_response, header
from cluster.gateway.recording.usage import UsageAccount
from cluster.usage import Usage

USAGE_HEADER = b"x-tandem-usage"
USAGE_EVENT = "tandem.usage"
MAX_HELD_BYTES = 8 * 1024 * 1024
"""Size above which a JSON response is returned unchanged instead of held."""


class _UsageBody(Body, Protocol):
    @property
    def usage(self) -> Usage | None: ...


def usage_requested(request: Request, account: UsageAccount | None) -> UsageAccount | None:
    """Return ``account`` if the response must contain the usage, else None.

    Raises:
        InvalidRequestError: The header is neither 1 nor 0.
    """
    if account is None:
        return None
    value = header(request.headers, USAGE_HEADER)
    if value not in (None, "0", "1"):
        raise InvalidRequestError("x-tandem-usage must be 1 or 0", param="x-tandem-usage")
    requested = value == "1" if value is not None else account.in_answers
    return account if requested else None


async def add_usage(request: Request, response: Response, account: UsageAccount) -> Response:
    """Return the response with its usage, in the JSON ``usage`` object or as the last event.

    Other responses, and JSON documents without ``usage``, are returned unchanged.

    Raises:
        ReplicaLostError: The replica was lost before the response was complete.
    """
    content_type = header(response.headers, b"content-type") or ""
    body = cast(_UsageBody, response.body)
    if content_type.startswith("text/event-stream"):
        # in_answers alone does not add the event: clients that did not ask may not expect it.
        if header(request.headers, USAGE_HEADER) is None:
            return response
        stream = _WithUsageEvent(body, account.currency)
        return Response(response.status, response.headers, stream)
    if not content_type.startswith("application/json") or response.status != 200:
        return response
    chunks, is_complete = await _read_chunks(body)
    if not is_complete:
        return Response(response.status, response.headers, _PartlyReadBody(chunks, body))
    document = _insert_usage(b"".join(chunks), body.usage, account.currency)
    others = [
        pair for pair in response.headers if pair[0] not in (b"content-length", b"content-type")
    ]
    return bytes_response(response.status, content_type.encode("latin-1"), document, others)


def _usage_object(usage: Usage | None, currency: str | None) -> dict[str, Any]:
    """Return the object ``usage.tandem``; a missing value is null, with the reason."""
    if usage is None:
        return {"joules": None, "joules_missing": "the engine counted no tokens", "cost": None}
    price = {"cost": None} if currency is None else {"cost": usage.cost, "currency": currency}
    if usage.source in REASONS:
        return {"joules": None, "joules_missing": REASONS[usage.source], **price}
    return {"joules": usage.joules, "source": usage.source, **price}


def _insert_usage(document: bytes, usage: Usage | None, currency: str | None) -> bytes:
    try:
        decoded = json.loads(document)
        decoded["usage"]["tandem"] = _usage_object(usage, currency)
        return json.dumps(decoded, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError):  # no `usage`, or text with lone surrogates
        return document


async def _read_chunks(body: _UsageBody) -> tuple[list[bytes], bool]:
    """Read up to ``MAX_HELD_BYTES``; return the chunks, and True if they are the whole body."""
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in body:
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_HELD_BYTES:
                return chunks, False
    except LinkError as error:
        raise ReplicaLostError(f"The replica was lost: {error}", retry_after_s=1) from error
    except BaseException:
        await body.aclose()
        raise
    return chunks, True


class _PartlyReadBody:
    """Body whose first chunks were read already."""

    def __init__(self, chunks: list[bytes], rest: Body) -> None:
        self._chunks = chunks
        self._rest = rest

    def __aiter__(self) -> "_PartlyReadBody":
        return self

    async def __anext__(self) -> bytes:
        if self._chunks:
            return self._chunks.pop(0)
        return await anext(aiter(self._rest))

    async def aclose(self) -> None:
        await self._rest.aclose()


class _WithUsageEvent:
    """A stream followed by the event ``tandem.usage``."""

    def __init__(self, stream: _UsageBody, currency: str | None) -> None:
        self._stream = stream
        self._currency = currency
        self._ended = False

    def __aiter__(self) -> "_WithUsageEvent":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(aiter(self._stream))
        except StopAsyncIteration:
            if self._ended:
                raise
        self._ended = True
        usage = _usage_object(self._stream.usage, self._currency)
        data = json.dumps(usage, separators=(",", ":"))
        return f"event: {USAGE_EVENT}\ndata: {data}\n\n".encode()

    async def aclose(self) -> None:
        await self._stream.aclose()
