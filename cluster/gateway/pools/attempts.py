"""The replicas that answer one request, one after the other."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter

from cluster.errors import (
    HandoverError,
    LinkClosedError,
    LinkError,
    LinkRefusedError,
    RequestError,
    UnavailableError,
)
from cluster.gateway.messages import Request
from cluster.gateway.pools.handover import KeptAnswer
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.replica import Answer
from cluster.gateway.pools.replica_set import ReplicasLostError
from cluster.gateway.pools.slots import Claim, Slot
from cluster.gateway.recording.observer import HandoverReason, RequestObserver
from cluster.link import ClientStream, RequestHead
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

MAX_LOST = 2
"""Replicas that may be lost with a request before its answer begins; it may be the cause."""
MAX_DEAD = 3
"""Replicas, or their engines, that may die or hang without progress of an answer that has begun. A
request that kills replicas kills two; the answers that moved from the first to the second must
survive."""
_LOST_POLL_S = 0.1


# A new instance for each raise: one that is raised again keeps the frames of each earlier raise.
class _DrainsError(LinkRefusedError):
    """The replica drains."""


class _HangsError(LinkClosedError):
    """The replica is silent."""


class _YieldsError(LinkRefusedError):
    """Another router began the answer at another replica."""


def _ignore(_error: Exception | None) -> None:
    pass


class Attempts:
    """Slot and answer of a request, and what another replica needs to continue the answer.

    ``on_finished`` is called when a replica has finished the answer, with its error if no other
    replica may continue it; not after ``end``.
    """

    def __init__(self, pool: Pool, slot: Slot, request: Request, observer: RequestObserver) -> None:
        self.slot = slot
        """The last slot; it may be released already."""
        self.answer: Answer | None = None
        self.on_finished: Callable[[Exception | None], None] = _ignore
        self.kept: KeptAnswer | None = None
        """None if no other replica can continue the answer."""
        self._pool = pool
        self._request = request
        self._observer = observer
        self._has_slot = True
        self._next_slot: Slot | None = None  # at the replica to which the answer moves

    def open(self, head: RequestHead, body: bytes) -> Answer:
        """Send the request to the slot's replica.

        Raises:
            LinkClosedError: The replica cannot be reached now.
        """
        replica, limits = self.slot.replica, self._pool.limits.handover
        info, state = replica.info, replica.state
        if state == "fallback":
            self._pool.meter.fallbacks.add()
        elif limits is not None and (resume_key := replica.resume_key(self.slot.claim.adapter)):
            self.kept = KeptAnswer.begin(head, body, limits, resume_key)
            if self.kept is not None:
                head = self.kept.head
        head = self._observer.trace_attempt(head, info.id, (info.host, info.port), state)
        answer = self.answer = replica.open(head, body)
        if isinstance(answer, ClientStream):
            replica.movable.add(self)
            if self.kept is not None:
                answer.record = self.kept.record
        return answer

    @contextmanager
    def yielding(self, answer: Answer) -> Iterator[None]:
        """Give up the answer if another router begins it at a replica with a lesser id.

        Two routers that get a key at the same moment both begin. They agree on one of the answers,
        and neither client has a part of the other one yet.

        Raises:
            LinkRefusedError: Another router began the answer.
        """
        key, own_id = self._request.answer_key, self.slot.replica.info.id
        if key is None or not isinstance(answer, ClientStream):
            yield
            return

        def compare(replica_id: str) -> None:
            if replica_id < own_id:
                answer.abandon(_YieldsError(_YieldsError.__doc__))

        awaited = self._pool.replicas.on_answer
        awaited[key.id] = compare
        try:
            yield
        finally:
            del awaited[key.id]
        if isinstance(answer.error, _YieldsError):
            raise answer.error

    def watch(self, answer: ClientStream) -> None:
        """Call ``on_finished`` when the replica has finished, or now if it has.

        From now on, only an answer that is kept can move.
        """
        if self.kept is None:
            self.slot.replica.remove_movable(self)
        answer.on_finished = partial(self._on_finished, answer, self.slot)
        if answer.ended:
            answer.finish()

    def grow(self) -> None:
        """Keep more of the answer, or give up its hand-over if that exceeds the limits."""
        if self.kept is not None and not self.kept.grow():
            self._forget()

    def end(self) -> None:
        """Drop what other replicas need, and the callback: the answer ends here."""
        # The callback's owner refers to this object. Without the cycle, the memory of a request is
        # free at once; collecting cycles that lived for seconds takes a full collection.
        self.on_finished = _ignore
        self._forget()

    def _forget(self) -> None:
        kept, self.kept = self.kept, None
        self.slot.replica.remove_movable(self)
        if kept is not None:
            kept.release()
            if isinstance(self.answer, ClientStream):
                self.answer.record = None
        slot, self._next_slot = self._next_slot, None
        if slot is not None:
            self._pool.queue.release_slot(slot)

    def release_slot(
        self, done_tokens: float | None, usage: Usage | None = None, *, is_abandoned: bool = False
    ) -> None:
        """Release the slot unless the replica was lost; see ``AdmissionQueue.release_slot``."""
        if self.answer is not None and not isinstance(self.answer, ClientStream):
            self.answer.cancel()
        if self._has_slot:
            self._has_slot = False
            self._pool.queue.release_slot(self.slot, done_tokens, usage, is_abandoned=is_abandoned)

    async def hand_over(self, error: LinkError | RequestError, content: int) -> bytes:
        """Have another replica continue the answer; return its first piece.

        Args:
            error: Failure of the last replica.
            content: Hash of the request.

        Raises:
            LinkError, RequestError: No other replica can; this is the last failure.
        """
        began_s = perf_counter()
        meter = self._pool.meter
        while (kept := self.kept) is not None and self._may_continue(kept, error):
            reason = handover_reason(error)
            slot = await self._other_slot(kept, error)
            if slot is None:
                meter.handed_over(reason, "failed")
                break
            kept.num_handovers += 1
            try:
                chunk = await self._continue_at(slot, kept)
            except (LinkError, UnavailableError) as another:
                if not isinstance(another, LinkError | HandoverError):
                    self._pool.replicas.record_failure(slot, content)
                meter.handed_over(reason, "failed")
                error = another
                continue
            meter.handed_over(reason, "continued")
            meter.handover_s.observe(perf_counter() - began_s)
            self._observer.num_handovers += 1
            logger.info("%s: handed over to %s", self._request.id, slot.replica.info.id)
            return chunk
        raise error

    # -- for the pool, while the replica drains or is silent --

    def move_claim(self) -> Claim | None:
        """Return the claim for a slot at another replica; None if the answer cannot move."""
        kept, answer = self.kept, self.answer
        if not isinstance(answer, ClientStream) or answer.ended or self._next_slot is not None:
            return None
        if kept is not None:
            return (
                replace(self._claim(kept), is_move=True) if self._has_handover_left(kept) else None
            )
        if self.slot.replica.is_draining:  # it answers soon
            return None
        return replace(self._pool.renew_claim(self.slot.claim), is_move=True)

    def move_to(self, slot: Slot) -> bool:
        """Let the replica of this slot go on; return False if the answer cannot move any more."""
        if self.move_claim() is None or not isinstance(self.answer, ClientStream):
            return False
        if self.kept is not None:
            self._next_slot = slot
        else:
            # The request is sent again. It waits before all others if the head of the queue gets
            # this slot.
            self._pool.queue.release_slot(slot)
        kind = _DrainsError if self.slot.replica.is_draining else _HangsError
        self.answer.abandon(kind(kind.__doc__))
        return True

    # -- internals --

    def _on_finished(self, answer: ClientStream, slot: Slot) -> None:
        error = answer.error
        if answer is not self.answer:  # it moved
            self._give_back(slot)
        elif error is None or self.kept is None or not self._may_continue(self.kept, error):
            self.on_finished(error)
        elif self._has_slot:  # the reader hands it over once it has read what arrived
            self._has_slot = False
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        # The replica that completes the answer is charged with all of it.
        self._pool.queue.release_slot(slot, 0.0, is_abandoned=True)

    def _may_continue(self, kept: KeptAnswer, error: Exception) -> bool:
        return isinstance(error, LinkError | UnavailableError) and self._has_handover_left(kept)

    def _has_handover_left(self, kept: KeptAnswer) -> bool:
        return kept.num_handovers < kept.limits.config.max_per_request

    async def _other_slot(self, kept: KeptAnswer, error: Exception) -> Slot | None:
        """Return a slot at another replica; None if a limit is reached, or none is free in time."""
        if not (kept.record.has_journal and kept.grow()):
            return None
        if isinstance(error, UnavailableError):
            kept.excluded |= {self.slot.replica.info.id}
        is_loss = not isinstance(error, LinkRefusedError)
        if is_loss:
            logger.warning("%s: replica lost during the answer: %s", self._request.id, error)
            # The request may have been the cause, so it must not reach every replica.
            max_lost = MAX_LOST if isinstance(error, HandoverError) else MAX_DEAD
            if kept.count_loss() >= max_lost:
                return None
        slot, self._next_slot = self._next_slot, None
        if slot is not None:  # there is room, so this does not multiply the load
            return slot
        if is_loss and not self._pool.retries.take_retry():
            return None
        try:
            return await self._wait_for_slot(self._claim(kept))
        except RequestError as refusal:
            logger.warning("%s: no replica continues the answer: %s", self._request.id, refusal)
            return None

    async def _wait_for_slot(self, claim: Claim) -> Slot:
        """Return a slot; wait outside of the queue, for others, while all replicas are lost.

        Raises:
            RequestError: No replica can continue the answer, or none in time.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await self._pool.queue.take_slot(claim)
            except ReplicasLostError:
                if loop.time() + _LOST_POLL_S > claim.expires_s:
                    raise
                await asyncio.sleep(_LOST_POLL_S)

    def _claim(self, kept: KeptAnswer) -> Claim:
        claim = self._pool.renew_claim(self.slot.claim)
        return replace(claim, resume_key=kept.resume_key, excluded=kept.excluded)

    async def _continue_at(self, slot: Slot, kept: KeptAnswer) -> bytes:
        """Have a replica continue the answer; return its first piece.

        Raises:
            LinkError, UnavailableError: The replica was lost, or cannot continue the answer.
        """
        self.slot.replica.remove_movable(self)
        self.slot, self._has_slot = slot, True
        info = slot.replica.info
        self._observer.slot_taken(info.id)
        head, body = kept.request()
        head = self._observer.trace_attempt(head, info.id, (info.host, info.port), "linked")
        try:
            answer = slot.replica.link.open(head, body)
        except LinkError:
            self.release_slot(0.0)
            raise
        self.answer = answer
        answer.record = kept.record
        if self._observer.write_times:  # of an event stream
            answer.arrivals_s = self._observer.write_times
        slot.replica.movable.add(self)
        self.watch(answer)
        response = await answer.head()
        if response.status != self._observer.status:
            answer.cancel()
            raise HandoverError(f"Another replica answered with status {response.status}.")
        chunk = await answer.read()
        self._pool.replicas.first_token(slot)
        return chunk


def handover_reason(error: Exception) -> HandoverReason:
    """Return the reason, for metrics, for which another replica takes over from one that failed."""
    if isinstance(error, _HangsError):
        return "hung"
    if isinstance(error, LinkRefusedError):
        return "drained"
    return "lost" if isinstance(error, LinkError) else "unavailable"
