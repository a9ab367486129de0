"""What requests took, as clients are told: ``GET /v1/usage``, and ``usage.tandem`` in an answer.

An answer stays as its engine wrote it unless its request asks (``x-tandem-usage: 1``): then a
whole JSON answer is held back until it is complete and gets ``usage.tandem``, and a stream gets one
more event after its last, ``tandem.usage``. The configuration can ask for all whole answers.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl

from cluster.accounting import REASONS
from cluster.accounting.usage import UsageSums, as_csv, as_json, parse_time
from cluster.accounting.usage_log import UsageLog
from cluster.config import TandemConfig
from cluster.errors import (
    InvalidRequestError,
    LinkError,
    PermissionDeniedError,
    UnavailableError,
)
from cluster.gateway.messages import (
    Body,
    Request,
    Response,
    bytes_response,
    header,
    json_response,
)
from cluster.usage import Usage

DAY_S = 24 * 3600.0
ASKS = b"x-tandem-usage"
MAX_HELD_BYTES = 8 * 1024 * 1024
"""A longer answer goes out as it is."""

_PARAMETERS = ("start", "end", "tenant", "format")


class UsageAccount:
    """What one router remembers of its requests' usage, and how it tells it.

    Args:
        config: The whole deployment's.
        log: Where the sums are kept.
        clock: Unix time.
    """

    def __init__(
        self, config: TandemConfig, log: UsageLog, clock: Callable[[], float] = time.time
    ) -> None:
        accounting = config.accounting
        self.in_answers = accounting.in_answers
        priced = accounting.per_cpu_hour or accounting.per_gpu_hour
        self.currency = accounting.currency if priced else None
        self._log = log
        self._clock = clock
        # As the authenticator shortens keys to tenants.
        self._operators = {digest[:16] for digest in config.router.operator_keys_sha256}

    def start(self) -> None:
        """Write what is remembered to its file from now on."""
        self._log.start()

    async def close(self) -> None:
        """Write the rest."""
        await self._log.close()

    def add(self, tenant: str, model: str, usage: Usage) -> None:
        """Remember a request that ended."""
        sums = UsageSums(
            1,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.joules or 0.0,
            usage.cost or 0.0,
        )
        self._log.add_request(tenant, model, usage.source, sums)

    async def answer(self, request: Request) -> Response:
        """``GET /v1/usage``.

        Raises:
            InvalidRequestError: a parameter is wrong.
            PermissionDeniedError: another tenant's usage is asked for.
        """
        asked = _query(request)
        end = parse_time(asked["end"], "end") if "end" in asked else self._clock()
        start = parse_time(asked["start"], "start") if "start" in asked else end - DAY_S
        if not start < end:
            raise InvalidRequestError("start must be before end", param="start")
        form = asked.get("format", "json")
        if form not in ("json", "csv"):
            raise InvalidRequestError(
                f"format: got {form[:40]!r}; json or csv are allowed", param="format"
            )
        rows = await self._log.find(start, end, self._whose(request.tenant, asked.get("tenant")))
        if form == "csv":
            return bytes_response(200, b"text/csv; charset=utf-8", as_csv(rows).encode())
        return json_response(as_json(rows, self.currency))

    def _whose(self, own: str, asked: str | None) -> str | None:
        """The tenant whose usage is shown; None: everybody's."""
        if not own or own in self._operators or asked == own:
            return asked
        if asked is not None:
            raise PermissionDeniedError(
                "A key shows the usage of its own tenant alone.", param="tenant"
            )
        return own


def _query(request: Request) -> dict[str, str]:
    asked = dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))
    for name in asked:
        if name not in _PARAMETERS:
            raise InvalidRequestError(
                f"no such parameter: {name[:40]!r}; allowed: {', '.join(_PARAMETERS)}", param=name
            )
    return asked


def wants_usage(request: Request, account: UsageAccount | None) -> UsageAccount | None:
    """Who tells what this request takes in its answer; None: nobody.

    Raises:
        InvalidRequestError: the header is neither 1 nor 0.
    """
    if account is None:
        return None
    given = header(request.headers, ASKS)
    if given not in (None, "0", "1"):
        raise InvalidRequestError("x-tandem-usage may be 1 or 0", param="x-tandem-usage")
    wanted = given == "1" if given is not None else account.in_answers
    return account if wanted else None


def figures(usage: Usage | None, currency: str | None) -> dict[str, Any]:
    """The object ``usage.tandem``; a figure that is missing is null, with the reason."""
    if usage is None:
        return {"joules": None, "joules_missing": "the engine counted no tokens", "cost": None}
    priced = {"cost": None} if currency is None else {"cost": usage.cost, "currency": currency}
    if usage.source in REASONS:
        return {"joules": None, "joules_missing": REASONS[usage.source], **priced}
    return {"joules": usage.joules, "source": usage.source, **priced}


class _Told(Body, Protocol):
    @property
    def usage(self) -> Usage | None: ...


async def tell_usage(request: Request, response: Response, account: UsageAccount) -> Response:
    """The answer with its usage: in a whole JSON answer's ``usage``, or as a stream's last event.

    Every other answer, and a JSON document without ``usage``, stays as it is.

    Raises:
        UnavailableError: the replica was lost before the whole answer was there.
    """
    kind = header(response.headers, b"content-type") or ""
    body = cast(_Told, response.body)
    if kind.startswith("text/event-stream"):
        if header(request.headers, ASKS) is None:  # a client may not know the event
            return response
        return Response(response.status, response.headers, _Followed(body, account.currency))
    if not kind.startswith("application/json") or response.status != 200:
        return response
    held = await _hold(body)
    if not held.complete:
        return Response(response.status, response.headers, held)
    written = _write_in(b"".join(held.taken), body.usage, account.currency)
    held.taken = [written]
    kept = [pair for pair in response.headers if pair[0] != b"content-length"]
    headers = [*kept, (b"content-length", str(len(written)).encode())]
    return Response(response.status, headers, held)


def _write_in(document: bytes, usage: Usage | None, currency: str | None) -> bytes:
    try:
        whole = json.loads(document)
        whole["usage"]["tandem"] = figures(usage, currency)
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, KeyError, TypeError):  # lone surrogates cannot be encoded, either
        return document


async def _hold(body: _Told) -> "_Held":
    """Take the body until it is complete, or too long to be held."""
    held = _Held(body)
    size = 0
    try:
        async for chunk in body:
            held.taken.append(chunk)
            size += len(chunk)
            if size > MAX_HELD_BYTES:
                return held
    except LinkError as error:
        raise UnavailableError(f"The replica was lost: {error}", retry_after_s=1) from error
    except BaseException:
        await body.aclose()
        raise
    held.complete = True
    return held


class _Held:
    """A body whose beginning, or all of it, was taken."""

    def __init__(self, rest: Body) -> None:
        self.taken: list[bytes] = []
        self.complete = False
        self._rest = rest

    def __aiter__(self) -> "_Held":
        return self

    async def __anext__(self) -> bytes:
        if self.taken:
            return self.taken.pop(0)
        return await anext(aiter(self._rest))

    async def aclose(self) -> None:
        await self._rest.aclose()


class _Followed:
    """A stream that tells its usage after its last event."""

    def __init__(self, stream: _Told, currency: str | None) -> None:
        self._stream = stream
        self._currency = currency
        self._told = False

    def __aiter__(self) -> "_Followed":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(aiter(self._stream))
        except StopAsyncIteration:
            if self._told:
                raise
        self._told = True
        data = json.dumps(figures(self._stream.usage, self._currency), separators=(",", ":"))
        return b"event: tandem.usage\ndata: " + data.encode() + b"\n\n"

    async def aclose(self) -> None:
        await self._stream.aclose()
