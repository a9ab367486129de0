"""Body of a replica's response, which another replica continues if the first one is lost."""

import asyncio
import logging
from dataclasses import replace
from functools import partial
from time import perf_counter

from cluster.errors import (
    LinkError,
    LinkRefusedError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from cluster.gateway.error_formats import error_events, first_event_error
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.forwarding import read_error, response_headers
from cluster.gateway.pools.handover import KeptAnswer
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.replica import Answer
from cluster.gateway.pools.slots import Claim, Slot
from cluster.gateway.recording.observer import HandoverReason, RequestObserver
from cluster.gateway.recording.request_log import ABANDONED, CLIENT_DISCONNECTED
from cluster.link import ClientStream, RequestHead
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

MAX_LOST = 2
"""Replicas that may be lost with one request without any progress of its answer."""
_MAX_BEGIN_BYTES = 64 * 1024

TIMED_OUT = (
    "The answer was not complete within `x-request-timeout-seconds`. Allow more time, or request "
    "fewer tokens."
)


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
        self._kept: KeptAnswer | None = None  # None if no other replica can continue the answer
        self._next_slot: Slot | None = None  # at the replica to which the answer moves
        self._is_event_stream = False
        self._first: bytes | None = None  # first chunk, until it is passed on
        self._begin = b""  # first chunk of an event stream, for the events after a failure
        self._last = b""
        self._is_read = False  # True once the client gets nothing more
        self._has_slot = True
        self._ended = False

    async def open(self, head: RequestHead, body: bytes) -> Response:
        """Send the request; return the response that has this body once its first byte is here.

        Raises:
            LinkError: The replica was lost or refused the request.
            UnavailableError: The replica cannot answer now.
            RequestError: The replica answered with an error, as status or as the first event.
        """
        try:
            head = self._begin_attempt(head, body)
            answer = self._answer = self._slot.replica.open(head, body)
            arrivals_s: list[float] = []
            if isinstance(answer, ClientStream):
                answer.arrivals_s = arrivals_s
                if self._kept is not None:
                    answer.journal = self._kept.journal
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
            self._drop_kept()
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
            self._watch(answer)
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

    async def aclose(self) -> None:
        """Cancel the rest of the response, if any."""
        if not self._is_read:
            self._abandon(CLIENT_DISCONNECTED)

    # -- for the pool, while the replica drains --

    def move_claim(self) -> Claim | None:
        """Return the claim for a slot at another replica; None if the answer cannot move."""
        kept, answer = self._kept, self._answer
        if kept is None or self._is_read or self._next_slot is not None:
            return None
        if not isinstance(answer, ClientStream) or answer.ended:
            return None
        return self._claim(kept) if self._may_continue(kept, _MOVED) else None

    def move_to(self, slot: Slot) -> bool:
        """Let the replica of this slot go on; return False if the answer cannot move any more."""
        if self.move_claim() is None or not isinstance(self._answer, ClientStream):
            return False
        self._next_slot = slot
        self._answer.abandon(_MOVED)
        return True

    # -- internals --

    def _begin_attempt(self, head: RequestHead, body: bytes) -> RequestHead:
        """Return the head for the slot's replica; keep the answer if others can continue it."""
        replica, limits = self._slot.replica, self._pool.limits.handover
        info, state = replica.info, replica.state
        if state == "fallback":
            self._pool.meter.fallbacks.add()
        elif limits is not None and info.resume_key:
            self._kept = KeptAnswer.begin(head, body, limits, info.resume_key)
            if self._kept is not None:
                head = self._kept.head
                replica.movable.add(self)
        return self._observer.trace_attempt(head, info.id, (info.host, info.port), state)

    def _watch(self, answer: ClientStream) -> None:
        answer.on_finished = partial(self._on_finished, answer, self._slot)
        if answer.ended:
            answer.finish()

    async def _read(self) -> bytes:
        answer, kept = self._answer, self._kept
        assert answer is not None
        claim = self._slot.claim
        try:
            if not claim.has_deadline:
                chunk = await answer.read()
            else:
                async with asyncio.timeout_at(claim.deadline_s):
                    chunk = await answer.read()
        except (LinkError, RequestError) as error:
            return await self._recover(error)
        except TimeoutError:
            return self._time_out()
        except BaseException:
            await self.aclose()
            raise
        if kept is None:
            if chunk and self._is_event_stream and not isinstance(answer, ClientStream):
                self._observer.write_times.append(perf_counter())
        elif len(kept.journal) > kept.max_journal_bytes and not kept.grow():
            self._drop_kept()
        return chunk

    async def _recover(self, error: LinkError | RequestError) -> bytes:
        """Return the next piece from another replica, or the event that ends a broken stream.

        Raises:
            LinkError, RequestError: See ``_last_event``.
        """
        claim = self._slot.claim
        try:
            async with asyncio.timeout_at(claim.deadline_s if claim.has_deadline else None):
                return await self._hand_over(error)
        except (LinkError, RequestError) as last:
            self._is_read = True
            self._end(last)
            return self._last_event(last)
        except TimeoutError:
            return self._time_out()
        except BaseException:
            await self.aclose()
            raise

    def _time_out(self) -> bytes:
        self._abandon(RequestTimeoutError.status)
        return self._last_event(RequestTimeoutError(TIMED_OUT))

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

    def _on_finished(self, answer: ClientStream, slot: Slot) -> None:
        """Release the slot; also end the request unless another replica may continue it."""
        error = answer.error
        if answer is not self._answer:  # it moved
            self._give_back(slot)
        elif error is None or self._kept is None or not self._may_continue(self._kept, error):
            self._end(error)
        elif self._has_slot:  # the reader hands it over once it has read what arrived
            self._has_slot = False
            self._give_back(slot)

    def _may_continue(self, kept: KeptAnswer, error: Exception) -> bool:
        return (
            isinstance(error, LinkError | UnavailableError)
            and kept.num_handovers < kept.limits.config.max_per_request
        )

    async def _hand_over(self, error: LinkError | RequestError) -> bytes:
        """Have another replica continue the answer; return its first piece.

        Raises:
            LinkError, RequestError: No other replica can; this is the last failure.
        """
        began_s = perf_counter()
        meter = self._pool.meter
        while (kept := self._kept) is not None and self._may_continue(kept, error):
            if isinstance(self._answer, ClientStream) and not kept.add_part(self._answer):
                break
            reason = _reason(error)
            slot = await self._other_slot(kept, error)
            if slot is None:
                meter.handed_over(reason, "failed")
                break
            kept.num_handovers += 1
            try:
                chunk = await self._continue_at(slot, kept)
            except (LinkError, UnavailableError) as another:
                meter.handed_over(reason, "failed")
                error = another
                continue
            meter.handed_over(reason, "continued")
            meter.handover_s.observe(perf_counter() - began_s)
            self._observer.num_handovers += 1
            logger.info("%s: handed over to %s", self._request.id, slot.replica.info.id)
            return chunk
        raise error

    async def _other_slot(self, kept: KeptAnswer, error: Exception) -> Slot | None:
        """Return a slot at another replica; None if a limit is reached, or none is free in time."""
        slot, self._next_slot = self._next_slot, None
        if slot is not None:
            return slot
        if isinstance(error, UnavailableError):
            kept.excluded |= {self._slot.replica.info.id}
        if not isinstance(error, LinkRefusedError):
            logger.warning("%s: replica lost during the answer: %s", self._request.id, error)
            # The request may have been the cause, so it must not reach every replica.
            if kept.count_loss() >= MAX_LOST or not self._pool.retries.take_retry():
                return None
        try:
            return await self._pool.queue.take_slot(self._claim(kept))
        except RequestError as refusal:
            logger.warning("%s: no replica continues the answer: %s", self._request.id, refusal)
            return None

    def _claim(self, kept: KeptAnswer) -> Claim:
        claim = self._pool.renew_claim(self._slot.claim)
        return replace(claim, resume_key=kept.resume_key, excluded=kept.excluded)

    async def _continue_at(self, slot: Slot, kept: KeptAnswer) -> bytes:
        """Have a replica continue the answer; return its first piece.

        Raises:
            LinkError, UnavailableError: The replica was lost, or cannot continue the answer.
        """
        self._slot.replica.remove_movable(self)
        self._slot, self._has_slot = slot, True
        self._observer.slot_taken(slot.replica.info.id)
        info = slot.replica.info
        head, body = kept.request()
        head = self._observer.trace_attempt(head, info.id, (info.host, info.port), "linked")
        try:
            answer = slot.replica.link.open(head, body)
        except LinkError:
            self._release_slot(0.0)
            raise
        self._answer = answer
        answer.journal = kept.journal
        if self._is_event_stream:
            answer.arrivals_s = self._observer.write_times
        slot.replica.movable.add(self)
        self._watch(answer)
        response = await answer.head()
        if response.status != self._observer.status:
            answer.cancel()
            raise UnavailableError(f"Another replica answered with status {response.status}.")
        chunk = await answer.read()
        self._pool.replicas.first_token(slot)
        return chunk

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
        self._ended = True
        self._drop_kept()
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
        if self._answer is not None and not isinstance(self._answer, ClientStream):
            self._answer.cancel()
        if not self._has_slot:
            return
        self._has_slot = False
        observer = self._observer
        is_abandoned = observer.status in ABANDONED or observer.is_cut_off
        self._pool.queue.release_slot(self._slot, done_tokens, usage, is_abandoned=is_abandoned)

    def _give_back(self, slot: Slot) -> None:
        """Release the slot of a replica whose answer another one continues, which is charged."""
        self._pool.queue.release_slot(slot, 0.0, is_abandoned=True)

    def _drop_kept(self) -> None:
        """Forget what other replicas would need to continue the answer."""
        kept, self._kept = self._kept, None
        self._slot.replica.remove_movable(self)
        if kept is not None:
            kept.release()
            if isinstance(self._answer, ClientStream):
                self._answer.journal = None
        slot, self._next_slot = self._next_slot, None
        if slot is not None:
            self._pool.queue.release_slot(slot)


_MOVED = LinkRefusedError("the replica drains; another one continues the answer")


def _reason(error: Exception) -> HandoverReason:
    if isinstance(error, LinkRefusedError):
        return "drained"
    return "lost" if isinstance(error, LinkError) else "unavailable"
