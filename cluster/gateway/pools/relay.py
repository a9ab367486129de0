"""Relay of a request to a replica and of its response back, without changing the bytes.

The head of a response is held until the first byte of its body has arrived. Until then, a request
can fail over to another replica, and an error in the first event of a stream becomes the status of
the response. After that, another replica continues the answer (``relayed_body``).
"""

import asyncio
import logging
import random
from dataclasses import replace
from hashlib import sha256

from cluster.errors import (
    InternalError,
    LinkError,
    LinkRefusedError,
    ReplicaLostError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    UnprocessableError,
)
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.attempts import MAX_LOST, handover_reason
from cluster.gateway.pools.forwarding import request_head
from cluster.gateway.pools.hedging import HedgedRequest
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relayed_body import TIMED_OUT, RelayedBody
from cluster.gateway.pools.response_usage import add_usage, usage_requested
from cluster.gateway.pools.slots import Claim, Slot
from cluster.gateway.recording.observer import FailoverReason, OnEnd, RequestObserver

logger = logging.getLogger("ray.serve.tandem")

MAX_ATTEMPTS = 5
"""Times that a request is sent to a replica before it fails; most of them may be refused."""
_SUSPECT_AGE_S = 0.1
"""A request that was sent less than this before the loss of its replica may be the cause; twice the
delay with which a busy router notices the loss."""
_SUSPECT_PAUSE_S = (0.5, 1.0)
"""Range of the time that it waits then; the others get their first bytes meanwhile."""
_HASHED_BYTES = 64 * 1024


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
            if isinstance(error, UnprocessableError):  # only the store of answers raises it
                observer.replay = "rejected"
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
    head.headers.extend(pool.caller_headers(request, claim))
    failure: FailoverReason | None = None
    num_lost = 0
    pool.retries.add_request()
    loop = asyncio.get_running_loop()
    for _ in range(MAX_ATTEMPTS):
        if failure is not None:
            claim = pool.renew_claim(claim)
        slot = await _take_slot(request, pool, claim)
        if request.on_slot is not None:
            request.on_slot()
        if failure is not None:
            pool.meter.failed_over(failure)
        observer.slot_taken(slot.replica.info.id)
        observer.is_trial |= pool.replicas.is_trial(slot)
        slot.replica.newest_request, sent_s = request.id, loop.time()
        try:
            async with asyncio.timeout_at(claim.deadline_s if claim.has_deadline else None):
                if failure is None and _may_hedge(request, pool):
                    return await HedgedRequest(pool, request, observer, head).open(slot)
                return await RelayedBody(pool, slot, request, observer).open(head, request.body)
        except TimeoutError:
            raise RequestTimeoutError(TIMED_OUT) from None
        except LinkRefusedError as error:
            failure = "refused"
            logger.info("%s: replica %s: %s", request.id, slot.replica.info.id, error)
        except (LinkError, UnavailableError) as error:
            # The request may have been the cause, so it must not reach every replica.
            failure = handover_reason(error)
            num_lost += 1
            logger.warning(
                "%s: lost replica %s before the answer: %s; request's body: %d bytes, SHA-256 of "
                "the first 64 KiB: %s",
                *(request.id, slot.replica.info.id, error, *_identify(request.body)),
            )
            if num_lost == MAX_LOST or not pool.retries.take_retry():
                raise ReplicaLostError(
                    f"{pool.name}: {num_lost} of {MAX_LOST} replicas were lost before they "
                    "answered; try again.",
                    retry_after_s=1,
                ) from error
            if slot.replica.newest_request == request.id:
                pause_s = _suspect_pause_s(loop.time() - sent_s)
                if claim.has_deadline:
                    pause_s = min(pause_s, max(0.0, claim.deadline_s - loop.time()))
                await asyncio.sleep(pause_s)
    raise UnavailableError(
        f"{pool.name}: {MAX_ATTEMPTS} replicas refused the request; try again.", retry_after_s=1
    )


def _suspect_pause_s(age_s: float) -> float:
    """Return the pause before another try of the last request that a lost replica got.

    A request that kills replicas must not reach the next one together with the requests that were
    lost with it, which would be lost twice. Several routers may hold such requests, so the pause is
    random, and shorter for the less suspect ones.
    """
    return max(0.0, 1 - age_s / _SUSPECT_AGE_S) * random.uniform(*_SUSPECT_PAUSE_S)


async def _take_slot(request: Request, pool: Pool, claim: Claim) -> Slot:
    """Take a slot: at the replica that has the answer, also if it was begun during the wait."""
    if (key := request.answer_key) is None:
        return await pool.queue.take_slot(claim)
    while True:
        claim = replace(claim, joins=pool.replicas.find_answer(key.id))
        slot = await pool.queue.take_slot(claim)
        if pool.replicas.find_answer(key.id) in (None, claim.joins):
            return slot
        pool.queue.release_slot(slot)


def _may_hedge(request: Request, pool: Pool) -> bool:
    """Return True if two replicas may work on a request; an idempotency key belongs to one."""
    return (
        pool.hedger.is_enabled
        and len(pool.replicas) > 1
        and request.method == "POST"
        and request.answer_key is None
    )


def _identify(body: bytes) -> tuple[int, str]:
    """Return the length of a body and the start of a hash of its start.

    A replica can be lost with hundreds of requests, and hashing long bodies blocks the event loop.
    """
    return len(body), sha256(memoryview(body)[:_HASHED_BYTES]).hexdigest()[:16]
