"""Passing one request to a replica and its answer back, bytes untouched.

Another replica is tried only while nothing of an answer was seen, so nothing is answered twice.
"""

import json
import logging
from time import perf_counter

from cluster.errors import (
    InternalError,
    LinkError,
    LinkRefusedError,
    RequestError,
    UnavailableError,
)
from cluster.gateway.admission.quotas import QuotaTicket, work_of
from cluster.gateway.messages import Headers, Request, Response
from cluster.gateway.pools.claim import Claim
from cluster.gateway.pools.pool import Answer, Pool, Slot
from cluster.gateway.pools.routes import OTHER
from cluster.gateway.recording.observer import FailoverReason, RequestObserver
from cluster.gateway.recording.request_log import CLIENT_LEFT
from cluster.gateway.recording.usage import ASKS, tell_usage, wants_usage
from cluster.link import RequestHead
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

MAX_ATTEMPTS = 3
"""Replicas that a request is offered to before it fails."""

_LOST = "The replica was lost while it answered."

_HOP_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_TENANT = b"x-tandem-tenant"
_OWN = frozenset({b"x-request-id", _TENANT, ASKS})
_NOT_FORWARDED = _HOP_HEADERS | _CREDENTIALS | _OWN | {b"host", b"expect"}
_NOT_RETURNED = _HOP_HEADERS | {b"server", b"date", b"x-request-id"}


async def relay(
    request: Request, pool: Pool, claim: Claim, grant: QuotaTicket | None = None
) -> Response:
    """Admit ``request`` to ``pool`` and return a replica's answer, whose body is still growing.

    Args:
        request: What to relay.
        pool: Which replicas may answer.
        claim: What it asks of the pool.
        grant: What its tenant's limits gave it; ended here. None: it is the router's own.

    Raises:
        InvalidRequestError: it has a header that is for the router, with a wrong value.
        OverloadedError: the pool's queue is full.
        UnavailableError: no replica is there, or each that was tried was lost.
    """
    meter = pool.meter
    watch = meter.watch(request, pool.routes.find(request.path) or OTHER, grant)
    try:
        wanted = wants_usage(request, meter.usage)
        response = await _relay(request, pool, claim, watch)
    except RequestError as error:
        watch.status = error.status
        watch.end(None)
        raise
    except Exception:  # a defect
        watch.status = InternalError.status
        watch.end(None)
        raise
    except BaseException:
        watch.end(None)
        raise
    return response if wanted is None else await tell_usage(request, response, wanted)


async def _relay(request: Request, pool: Pool, claim: Claim, watch: RequestObserver) -> Response:
    head = _request_head(request)
    failed: FailoverReason | None = None
    for _ in range(MAX_ATTEMPTS):
        place = await pool.admit(claim)
        if failed is not None:
            pool.meter.failed_over(failed)
        watch.placed(place.replica.info.id)
        body = RelayedBody(pool, place, request.id, watch)
        try:
            return await body.begin(head, request.body)
        except (LinkError, UnavailableError) as error:
            failed = _why(error)
            logger.warning("%s: replica %s: %s", request.id, place.replica.info.id, error)
    raise UnavailableError(
        f"{pool.name}: {MAX_ATTEMPTS} replicas were lost before they answered", retry_after_s=1
    )


def _why(error: LinkError | UnavailableError) -> FailoverReason:
    if isinstance(error, LinkRefusedError):
        return "refused"
    return "lost" if isinstance(error, LinkError) else "unavailable"


class RelayedBody:
    """A replica's answer on its way out; frees the replica's place when it ends in whatever way."""

    def __init__(self, pool: Pool, place: Slot, request_id: str, watch: RequestObserver) -> None:
        self._pool = pool
        self._place = place
        self._is_first = True
        self._request_id = request_id
        self._watch = watch
        self._answer: Answer | None = None
        self._is_event_stream = False
        self._ended = False

    async def begin(self, head: RequestHead, body: bytes) -> Response:
        """Send the request; returns the answer that this is the body of.

        Raises:
            LinkError, UnavailableError: the replica was lost, or does not take it.
            RequestError: it could not answer.
        """
        try:
            replica = self._place.replica
            info, way = replica.info, replica.state
            if way == "fallback":
                self._pool.meter.fallbacks.add()
            head = self._watch.asks(head, info.id, (info.host, info.port), way)
            self._answer = replica.open(head, body)
            given = await self._answer.head()
        except BaseException:
            self._free(0.0)
            raise
        headers = [pair for pair in given.headers if pair[0] not in _NOT_RETURNED]
        self._is_event_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )
        self._watch.status = given.status
        return Response(given.status, headers, self)

    @property
    def usage(self) -> Usage | None:
        """What the request took, once its answer has ended."""
        return self._answer.usage if self._answer is not None else None

    def __aiter__(self) -> "RelayedBody":
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise StopAsyncIteration
        assert self._answer is not None
        try:
            chunk = await self._answer.read()
        except (LinkError, RequestError) as error:
            return self._cut_off(error)
        except BaseException:
            await self.aclose()
            raise
        if not chunk:
            if self._place.replica.is_draining:
                self._pool.meter.failed_over("drained")
            self._end()
            raise StopAsyncIteration
        if self._is_event_stream:
            self._watch.writes.append(perf_counter())
            if self._is_first:
                self._is_first = False
                self._pool.first_token(self._place)
        return chunk

    async def aclose(self) -> None:
        """Cancel what is left of the answer and give the replica's place back; once."""
        if not self._ended:
            self._watch.status = CLIENT_LEFT
            self._end()

    def _cut_off(self, error: LinkError | RequestError) -> bytes:
        """What a client is told of an answer that breaks off, where its format can say it."""
        self._pool.meter.cut_off.add()
        self._watch.cut_off = True
        self._end()
        logger.warning("%s: answer cut off: %s", self._request_id, error)
        if not self._is_event_stream:
            raise error
        lost = error if isinstance(error, RequestError) else UnavailableError(_LOST)
        return b"data: " + json.dumps(lost.body()).encode() + b"\n\n"

    def _end(self) -> None:
        assert self._answer is not None
        usage = self._answer.usage
        if usage is not None:
            claim = self._place.claim
            self._pool.estimate.learn_usage(claim.body_bytes, usage, claim.text)
        self._free(self._done_tokens(usage), usage)
        self._watch.end(usage)

    def _done_tokens(self, usage: Usage | None) -> float | None:
        """The work that was done; where the replica did not say, what was expected."""
        if usage is not None:
            return work_of(usage)
        if self._watch.status == CLIENT_LEFT:
            return None
        return 0.0 if self._watch.status >= 400 else self._place.claim.work_tokens

    def _free(self, done_tokens: float | None, usage: Usage | None = None) -> None:
        self._ended = True
        if self._answer is not None:
            self._answer.cancel()
        self._pool.release(self._place, done_tokens, usage)


def _request_head(request: Request) -> RequestHead:
    headers: Headers = [pair for pair in request.headers if pair[0] not in _NOT_FORWARDED]
    headers.append((b"x-request-id", request.id.encode()))
    if request.tenant:
        headers.append((_TENANT, request.tenant.encode()))
    return RequestHead(
        method=request.method, path=request.path, query_string=request.query, headers=headers
    )
