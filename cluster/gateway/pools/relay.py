"""Relay of a request to a replica and of its response back, without changing the bytes.

The head of a response is held until the first byte of its body has arrived. Until then, a request
can fail over to another replica, and an error in the first event of a stream becomes the status of
the response. After that, a broken stream ends with an error event in the format of its API.
"""

import asyncio
import logging
from hashlib import sha256
from time import perf_counter

from cluster.errors import (
    InternalError,
    LinkError,
    LinkRefusedError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from cluster.gateway.error_formats import error_events, first_event_error
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.forwarding import read_error, request_head, response_headers
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.replica import Answer
from cluster.gateway.pools.response_usage import add_usage, usage_requested
from cluster.gateway.pools.slots import Claim, Slot
from cluster.gateway.recording.observer import FailoverReason, OnEnd, RequestObserver
from cluster.gateway.recording.request_log import ABANDONED, CLIENT_DISCONNECTED
from cluster.link import ClientStream, RequestHead
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

MAX_ATTEMPTS = 5
"""Times that a request is sent to a replica before it fails; most of them may be refused."""
MAX_LOST = 2
"""Replicas that may be lost with one request: it is retried once, within the pool's budget."""

_HASHED_BYTES = 64 * 1024
_MAX_BEGIN_BYTES = 64 * 1024
_TIMED_OUT = (
    "The answer was not complete within `x-request-timeout-seconds`. Allow more time, or request "
    "fewer tokens."
)


async def relay(
    request: Request, pool: Pool, claim: Claim, on_end: OnEnd | None = None
) -> Response:
    """Send a request to a replica of the pool; return its response, whose body is still growing.

    Args:
        request: The request to relay.
        pool: Pool whose replicas may answer.
        claim: The request's demand on the pool.
        on_end: Called once at the end with the status, the usage, and True if the request had a
            slot. None for requests that the router itself makes.

    Raises:
        InvalidRequestError: A header for the router has an invalid value.
        OverloadedError: The queue is full, or the wait too long.
        UnavailableError: No replica is available, or the request failed at ``MAX_LOST`` replicas.
    """
    observer = pool.meter.observe(request, pool.route_of(request.path), on_end)
    try:
        account = usage_requested(request, pool.meter.usage)
        response = await _send_with_failover(request, pool, claim, observer)
    except BaseException as error:
        if isinstance(error, RequestError):
            observer.status = error.status
        elif isinstance(error, Exception):  # a defect
            observer.status = InternalError.status
        if not observer.ends_later:
            observer.end(None)  # a cancellation keeps the status of a disconnect
        raise
    request.release_body()  # the answer has begun, so there is no retry
    return response if account is None else await add_usage(request, response, account)


async def _send_with_failover(
    request: Request, pool: Pool, claim: Claim, observer: RequestObserver
) -> Response:
    head = request_head(request, claim.priority if pool.limits.engine_priorities else None)
    failure: FailoverReason | None = None
    num_lost = 0
    pool.retries.add_request()
    for _ in range(MAX_ATTEMPTS):
        if failure is not None:
            claim = pool.renew_claim(claim)
        slot = await pool.queue.take_slot(claim)
        if failure is not None:
            pool.meter.failed_over(failure)
        observer.slot_taken(slot.replica.info.id)
        body = RelayedBody(pool, slot, request, observer)
        try:
            async with asyncio.timeout_at(claim.deadline_s if claim.has_deadline else None):
                return await body.open(head, request.body)
        except TimeoutError:
            raise RequestTimeoutError(_TIMED_OUT) from None
        except LinkRefusedError as error:
            failure = "refused"
            logger.info("%s: replica %s: %s", request.id, slot.replica.info.id, error)
        except (LinkError, UnavailableError) as error:
            # The request may have been the cause, so it must not reach every replica.
            failure = "lost" if isinstance(error, LinkError) else "unavailable"
            num_lost += 1
            logger.warning(
                "%s: lost replica %s before the answer: %s; request's body: %d bytes, SHA-256 of "
                "the first 64 KiB: %s",
                *(request.id, slot.replica.info.id, error, *_identify(request.body)),
            )
            if num_lost == MAX_LOST or not pool.retries.take_retry():
                raise UnavailableError(
                    f"{pool.name}: {num_lost} of {MAX_LOST} replicas were lost before they "
                    "answered; try again.",
                    retry_after_s=1,
                ) from error
    raise UnavailableError(
        f"{pool.name}: {MAX_ATTEMPTS} replicas refused the request; try again.", retry_after_s=1
    )


def _identify(body: bytes) -> tuple[int, str]:
    """Return the length of a body and the start of a hash of its start.

    A replica can be lost with hundreds of requests, and hashing long bodies blocks the event loop.
    """
    return len(body), sha256(memoryview(body)[:_HASHED_BYTES]).hexdigest()[:16]


class RelayedBody:
    """Body of a replica's response.

    Releases the slot and ends the observation when the replica has finished, however slowly the
    client reads. If the client disconnects, that is when the replica has reported the usage.
    """

    def __init__(self, pool: Pool, slot: Slot, request: Request, observer: RequestObserver) -> None:
        self._pool = pool
        self._slot = slot
        self._request = request
        self._observer = observer
        self._answer: Answer | None = None
        self._is_event_stream = False
        self._first: bytes | None = None  # first chunk, until it is passed on
        self._begin = b""  # first chunk of an event stream, for the events after a failure
        self._last = b""
        self._is_read = False  # True once the client gets nothing more
        self._ended = False  # True once the slot is released

    async def open(self, head: RequestHead, body: bytes) -> Response:
        """Send the request; return the response that has this body once its first byte is here.

        Raises:
            LinkError: The replica was lost or refused the request.
            UnavailableError: The replica cannot answer now.
            RequestError: The replica answered with an error, as status or as the first event.
        """
        try:
            replica = self._slot.replica
            info, state = replica.info, replica.state
            if state == "fallback":
                self._pool.meter.fallbacks.add()
            head = self._observer.trace_attempt(head, info.id, (info.host, info.port), state)
            answer = self._answer = replica.open(head, body)
            arrivals_s: list[float] = []
            if isinstance(answer, ClientStream):
                answer.arrivals_s = arrivals_s
            response = await answer.head()
            headers = response_headers(response)
            self._is_event_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in headers
            )
            if response.status >= 400 and not self._is_event_stream:
                headers, self._first = await read_error(self._request.path, response, answer)
            else:
                self._first = await answer.read()
            if self._is_event_stream and (error := first_event_error(self._first)) is not None:
                raise error
            if self._is_event_stream and len(self._first) <= _MAX_BEGIN_BYTES:
                self._begin = self._first
        except asyncio.CancelledError:
            self._observer.ends_later = True
            await self.aclose()
            raise
        except BaseException:
            self._release_slot(0.0)
            if self._answer is not None:
                self._answer.cancel()
            raise
        self._observer.status = response.status
        if self._is_event_stream and self._first:
            self._observer.write_times = arrivals_s or [perf_counter()]
            self._pool.replicas.first_token(self._slot)
        if isinstance(answer, ClientStream):
            if not self._is_event_stream:
                answer.arrivals_s = None
            answer.on_finished = self._on_finished
            if answer.ended:
                answer.finish()
        return Response(response.status, headers, self)

    @property
    def usage(self) -> Usage | None:
        """Usage of the request; known once its response has ended."""
        return self._answer.usage if self._answer is not None else None

    def __aiter__(self) -> "RelayedBody":
        return self

    async def __anext__(self) -> bytes:
        if self._is_read:
            raise StopAsyncIteration
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._read()
        if not chunk:
            self._is_read = True
            self._end()
            raise StopAsyncIteration
        self._last = chunk
        return chunk

    async def _read(self) -> bytes:
        answer = self._answer
        assert answer is not None
        claim = self._slot.claim
        try:
            if not claim.has_deadline:
                chunk = await answer.read()
            else:
                async with asyncio.timeout_at(claim.deadline_s):
                    chunk = await answer.read()
        except TimeoutError:
            self._abandon(RequestTimeoutError.status)
            return self._last_event(RequestTimeoutError(_TIMED_OUT))
        except (LinkError, RequestError) as error:
            self._is_read = True
            self._end(error)
            return self._last_event(error)
        except BaseException:
            await self.aclose()
            raise
        if chunk and self._is_event_stream and not isinstance(answer, ClientStream):
            self._observer.write_times.append(perf_counter())
        return chunk

    async def aclose(self) -> None:
        """Cancel the rest of the response, if any."""
        if not self._is_read:
            self._abandon(CLIENT_DISCONNECTED)

    def _abandon(self, status: int) -> None:
        self._is_read = True
        answer = self._answer
        if not self._ended and answer is not None:
            self._observer.status = status
            if isinstance(answer, ClientStream) and not answer.ended:
                answer.on_finished = self._end
                answer.cancel()
                return
        self._end()

    def _on_finished(self) -> None:
        assert isinstance(self._answer, ClientStream)
        self._end(self._answer.error)

    def _last_event(self, error: LinkError | RequestError) -> bytes:
        """Return the error event that ends a broken stream.

        Raises:
            LinkError, RequestError: The format has no such event, or the last event is incomplete;
                only closing the connection shows the client that the response is incomplete.
        """
        if not self._is_event_stream or not self._last.endswith(b"\n"):
            raise error
        if isinstance(error, LinkError):
            error = UnavailableError("The replica was lost during the response; try again.")
        event = error_events(self._request.path, error, self._begin, self._last)
        if event is None:
            raise error
        return event if self._last.endswith(b"\n\n") else b"\n" + event

    def _end(self, error: Exception | None = None) -> None:
        """Release the slot and record the end of the request, once."""
        if self._ended:
            return
        observer, usage = self._observer, self.usage
        if error is not None:
            self._pool.meter.cut_off.add()
            observer.is_cut_off = True
            logger.warning("%s: response cut off: %s", self._request.id, error)
        elif observer.status not in ABANDONED:
            if self._slot.replica.is_draining:
                self._pool.meter.failed_over("drained")
            if usage is not None:
                claim = self._slot.claim
                self._pool.estimator.learn_usage(
                    claim.body_bytes, usage, claim.prompt, claim.view.fan_out
                )
        self._release_slot(self._done_tokens(usage), usage)
        observer.end(usage)

    def _done_tokens(self, usage: Usage | None) -> float | None:
        """Return the work that was done; None if unknown, which teaches no service time."""
        if usage is not None:
            return float(usage.computed_tokens)
        if self._observer.status in ABANDONED:
            return None
        return 0.0 if self._observer.status >= 400 else None

    def _release_slot(self, done_tokens: float | None, usage: Usage | None = None) -> None:
        self._ended = True
        if self._answer is not None and not isinstance(self._answer, ClientStream):
            self._answer.cancel()
        observer = self._observer
        is_abandoned = observer.status in ABANDONED or observer.is_cut_off
        self._pool.queue.release_slot(self._slot, done_tokens, usage, is_abandoned=is_abandoned)
