"""Admission queue of one pool: fair order, deadlines, and the refusals.

Every request ends here exactly once, with a slot or a typed error. A request is refused as soon as
its estimated wait exceeds its timeout, so that clients can go elsewhere at once.

Estimates that only traffic can correct never refuse that traffic: nothing is refused by an estimate
while the engines have room, nor in a short queue before as many requests have finished as are in
flight.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.admission import (
    MAX_BACKLOG,
    MAX_PRIORITY,
    MAX_SHARE,
    RECENT_S,
    FairQueue,
    Headroom,
    PoolCapacity,
    QueueEntry,
    QueueLimits,
    WaitCorrection,
    rank_of,
)
from cluster.errors import OverloadedError, RequestError, UnavailableError
from cluster.gateway.pools.slots import Claim, Slot, SlotSource
from cluster.gateway.recording.observer import PoolMeter
from cluster.load import Load
from cluster.usage import Usage

MAX_RETRY_S = 60.0
"""Upper limit of the ``Retry-After`` header."""
_RETRY_PRIORITY = MAX_PRIORITY + 1
_NO_REPLICA_RETRY_S = 5.0
# Refuse if 1.5 times the estimated wait exceeds the timeout: the estimate is uncertain, overload
# keeps every wait at the limit, and a shorter queue costs no throughput.
_WAIT_MARGIN = 1.5
# Finished requests of a standing queue after which its estimates are trusted. The first number also
# suffices if it is all that are in flight: the estimates then stem from the present load.
_MIN_FINISHED, _MAX_FINISHED = 4, 16
# Queued requests per request in flight up to which a queue is short.
_SHORT_QUEUE = 4
# Finished requests of a standing queue until which faster recent ones are preferred. By then, 13 %
# of the slow averages stem from earlier load (0.99 to the power of 200).
_HOPEFUL_FINISHED = 200
# Part of its time that a request must have waited to be skipped as too late. Before that, only the
# estimate can be at fault.
_MIN_SKIP_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Waiter:
    """A request that waits for a slot."""

    claim: Claim
    slot: asyncio.Future[Slot]
    since_s: float


class AdmissionQueue:
    """Assigns slots to requests in fair order, up to the capacity of the pool."""

    def __init__(
        self,
        pool_name: str,
        limits: QueueLimits,
        capacity: PoolCapacity,
        slots: SlotSource,
        meter: PoolMeter,
    ) -> None:
        self.capacity = capacity
        self._pool_name = pool_name
        self._slots = slots
        self._meter = meter
        self._queue: FairQueue[Waiter] = FairQueue(limits)
        self._headroom = Headroom(self._queue.num_of)
        self._closed = False
        self._correction = WaitCorrection()
        self._num_finished = 0  # requests that finished since the queue was last empty
        self._slots_are_full = False  # the last attempt failed although the capacity had room
        self._leaves_slots = False  # the first request left the free slots to other tenants
        self._leaves_until: asyncio.TimerHandle | None = None  # set while it may have to

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> float:
        """Estimated work of the requests in the queue, in tokens."""
        return self._queue.tokens

    @property
    def has_room(self) -> bool:
        """True if a request that arrives now would get a slot at once."""
        is_open = not self._closed and not self._queue
        return is_open and self.capacity.has_room and self._slots.has_room

    def set_limits(self, limits: QueueLimits) -> None:
        """Change the limits for requests that arrive from now on."""
        self._queue.limits = limits

    async def take_slot(self, claim: Claim) -> Slot:
        """Return a slot, at once or after a wait; give it back with ``release_slot``.

        Raises:
            OverloadedError: The queue is full, or the slot would come or came too late.
            UnavailableError: No replica became ready in time, no running replica can serve the
                request, or the router is stopping.
        """
        if self._closed:
            raise _stopping()
        if claim.joins is not None:
            slot = self._slots.take_slot_at(claim.joins, claim)
            if slot is not None:
                self._count(claim)
                return slot
        if claim.is_retry:
            return await self._retake_slot(claim)
        tenant, now_s = claim.identity.tenant, asyncio.get_running_loop().time()
        self._headroom.note_arrival(tenant.name, rank_of(tenant.weight, claim.priority), now_s)
        if not self._queue:
            self._num_finished = 0
            if (slot := self._try_slot(claim)) is not None:
                return slot
        return await self._wait(claim)

    def take_free_slot(self, claim: Claim) -> Slot | None:
        """Return a slot if no request waits and a replica has room, or None."""
        try:
            return None if self._closed or self._queue else self._try_slot(claim)
        except UnavailableError:
            return None

    def release_slot(
        self,
        slot: Slot,
        done_tokens: float | None = 0.0,
        usage: Usage | None = None,
        *,
        is_abandoned: bool = False,
    ) -> None:
        """Release the slot of a request that has ended.

        Args:
            slot: Returned by ``take_slot``.
            done_tokens: Work that was done; 0 if the request failed, None if unknown.
            usage: Usage of the request, if the replica reported it.
            is_abandoned: True if the client disconnected or read slowly, or the replica was lost:
                the tenant pays, but the duration says nothing about the replicas.
        """
        claim = slot.claim
        held_s = self._slots.release_slot(slot, None if is_abandoned else usage)
        learned_tokens = 0.0 if is_abandoned or done_tokens is None else done_tokens
        self.capacity.remove_request(claim.work_tokens, learned_tokens, held_s)
        self._headroom.remove_request(claim.identity.tenant.name)
        self._num_finished += bool(learned_tokens)
        if done_tokens is not None:
            tenant = claim.identity.tenant
            excess = done_tokens - claim.work_tokens
            if not slot.is_charged:
                excess = max(0.0, excess)
            self._queue.charge(tenant.name, claim.priority, tenant.weight, excess)
        self.dispatch()

    def charge_tenant(self, tenant: str, tokens: float) -> None:
        """Charge a tenant for work at another router; other tenants then go first here."""
        self._queue.charge_all(tenant, tokens)

    def observe_loads(self, loads: Iterable[Load]) -> None:
        """Adapt the capacity to the replicas' loads, and dispatch."""
        self.capacity.observe_loads(loads, asyncio.get_running_loop().time())
        self.dispatch()

    def dispatch(self) -> None:
        """Assign free slots to the requests in the queue."""
        while (entry := self._choose_entry()) is not None:
            waiter = entry.item
            if waiter.slot.done():  # cancelled, but its task has not run since
                self._queue.remove(entry)
            elif waiter.claim.has_deadline and self._will_miss_deadline(waiter):
                self._queue.remove(entry)
                waiter.slot.set_exception(self._too_late())
            else:
                self._offer_slot(entry)
                if not waiter.slot.done():
                    return

    def close(self) -> None:
        """Reject the requests in the queue and all later ones: the router is stopping."""
        self._closed = True
        if self._leaves_until is not None:
            self._leaves_until.cancel()
        for entry in self._queue.drain():
            if not entry.item.slot.done():
                entry.item.slot.set_exception(_stopping())

    def _offer_slot(self, entry: QueueEntry[Waiter]) -> None:
        waiter = entry.item
        try:
            slot = self._try_slot(waiter.claim)
        except UnavailableError as error:
            self._queue.remove(entry)
            waiter.slot.set_exception(error)
            return
        if slot is not None:
            self._queue.take(entry)
            # `_retake_slot` charges retries.
            waiter.slot.set_result(replace(slot, is_charged=not waiter.claim.is_retry))

    def _try_slot(self, claim: Claim) -> Slot | None:
        if not self.capacity.has_room:
            return None
        slot = self._slots.take_slot(claim)
        self._slots_are_full = slot is None
        if slot is not None:
            self._count(claim)
        return slot

    def _count(self, claim: Claim) -> None:
        self.capacity.add_request(claim.work_tokens)
        self._headroom.add_request(claim.identity.tenant.name)

    def _choose_entry(self) -> QueueEntry[Waiter] | None:
        """Return the entry to serve next, of a tenant that may use the slots that are free."""
        entry = self._queue.peek()
        self._leaves_slots = entry is not None and self._must_leave_slots(entry)
        if not self._leaves_slots:
            return entry
        if self._leaves_until is None:
            self._leaves_until = asyncio.get_running_loop().call_later(RECENT_S, self._look_again)
        return self._queue.peek_without_backlog(MAX_BACKLOG)

    def _look_again(self) -> None:
        """Dispatch once others may no longer need the free slots, which no other event tells."""
        self._leaves_until = None
        self.dispatch()

    def _must_leave_slots(self, entry: QueueEntry[Waiter]) -> bool:
        if entry.item.claim.is_retry or not self.capacity.in_flight:
            return False
        now_s = asyncio.get_running_loop().time()
        num_wanted = self._headroom.num_wanted(entry.tenant, entry.rank, now_s)
        slots = self._slots.engine_slots() if num_wanted else None
        if slots is None:
            return False
        num_reserved = min(num_wanted, int(MAX_SHARE * slots.total))
        return bool(num_reserved) and slots.free <= num_reserved

    async def _retake_slot(self, claim: Claim) -> Slot:
        """Return a slot for a request that had one, before all others."""
        slot = self._try_slot(claim) or await self._wait(claim)
        # Releasing the first slot refunded the work.
        tenant = claim.identity.tenant
        self._queue.charge(tenant.name, claim.priority, tenant.weight, claim.work_tokens)
        return replace(slot, is_charged=True)

    async def _wait(self, claim: Claim) -> Slot:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Slot] = loop.create_future()
        tenant = claim.identity.tenant
        since_s = loop.time()
        entry: QueueEntry[Waiter] = QueueEntry(
            Waiter(claim, future, since_s),
            tenant.name,
            claim.work_tokens,
            claim.expires_s,
            1.0 if claim.is_retry else tenant.weight,
            _RETRY_PRIORITY if claim.is_retry else claim.priority,
        )
        estimated_s = 0.0 if claim.is_retry else self._estimate_wait_s(entry, since_s)
        wait_s = estimated_s * self._correction.factor(tenant.name, since_s)
        self._refuse_if_late(claim, wait_s)
        # Retries were in flight, which bounds them; the queue's limits are for new requests.
        if not self._queue.push(entry, is_limited=not claim.is_retry):
            self._displace_for(entry, wait_s)
        if self._leaves_slots:
            self.dispatch()  # the free slots may be for tenants like this one
        timer = loop.call_at(claim.expires_s, self._expire, entry)
        try:
            return await future
        except asyncio.CancelledError:
            self._queue.remove(entry)
            # The slot may have been assigned in the same loop iteration as the cancellation.
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release_slot(future.result())
            raise
        finally:
            timer.cancel()
            if estimated_s and _is_evidence(future):
                now_s = loop.time()
                self._correction.learn(tenant.name, estimated_s, now_s - since_s, now_s)

    def _displace_for(self, entry: QueueEntry[Waiter], wait_s: float) -> None:
        """Queue an entry in a full queue by rejecting requests of lower priority classes.

        Raises:
            OverloadedError: That does not make room for it.
        """
        displaced = self._queue.displace(entry)
        for loser in displaced:
            if not loser.item.slot.done():
                self._meter.shed("displaced")
                message = f"{self._pool_name}: displaced from the full queue by a higher priority"
                loser.item.slot.set_exception(
                    _DisplacedError(message, retry_after_s=self._drain_s())
                )
        if not displaced or not self._queue.push(entry):
            self._meter.shed("queue_full")
            raise OverloadedError(
                f"{self._pool_name}: the queue is full", retry_after_s=_retry_s(wait_s)
            )

    def _estimate_wait_s(self, entry: QueueEntry[Waiter], now_s: float) -> float:
        """Return the wait of a new entry in seconds; 0 if nothing reliable is known."""
        if not self._slots.num_ready or not self._can_estimate(now_s):
            return 0.0
        rate = self.capacity.drain_tokens_per_s(hopeful=self._is_hopeful)
        return self._queue.tokens_before(entry) / rate if rate else 0.0

    def _can_estimate(self, now_s: float) -> bool:
        in_flight = self.capacity.in_flight
        if self._slots_are_full and len(self._queue) > _SHORT_QUEUE * in_flight:
            return True
        min_finished = max(_MIN_FINISHED, min(_MAX_FINISHED, in_flight))
        is_stuck = self._slots_are_full or self._leaves_slots or self.capacity.is_saturated(now_s)
        return is_stuck and self._num_finished >= min_finished

    @property
    def _is_hopeful(self) -> bool:
        return self._num_finished < _HOPEFUL_FINISHED

    def _refuse_if_late(self, claim: Claim, wait_s: float) -> None:
        if not self._would_be_late(claim, wait_s):
            return
        reason = "deadline cannot be met" if claim.has_deadline else "wait would exceed the timeout"
        self._meter.shed("deadline" if claim.has_deadline else "too_long")
        raise OverloadedError(
            f"{self._pool_name}: {reason}; estimated queue wait is {wait_s:.1f} s",
            retry_after_s=_retry_s(wait_s),
        )

    def _would_be_late(self, claim: Claim, wait_s: float) -> bool:
        start_s = asyncio.get_running_loop().time() + wait_s * _WAIT_MARGIN
        if start_s > claim.expires_s:
            return True
        if not wait_s:  # it corrects the estimates
            return False
        request_s = self.capacity.average_request_s(claim.work_tokens, hopeful=self._is_hopeful)
        return start_s + request_s > claim.deadline_s

    def _will_miss_deadline(self, waiter: Waiter) -> bool:
        """Return True if a request that became late in the queue would finish too late."""
        claim, now_s = waiter.claim, asyncio.get_running_loop().time()
        if now_s - waiter.since_s < _MIN_SKIP_SHARE * (claim.deadline_s - waiter.since_s):
            return False
        # An average duration suffices to skip the first request if another one can have its slot.
        alone = len(self._queue) <= 1
        request_s = self.capacity.best_request_s if alone else self.capacity.average_request_s
        return now_s + request_s(claim.work_tokens) > claim.deadline_s

    def _expire(self, entry: QueueEntry[Waiter]) -> None:
        if entry is self._queue.peek() and not self._leaves_slots:
            self._queue.pop()  # all others waited for it, so its tenant pays for its turn
        self._queue.remove(entry)
        if not entry.item.slot.done():
            entry.item.slot.set_exception(self._too_late())

    def _too_late(self) -> RequestError:
        if not self._slots.num_ready:
            return UnavailableError(
                f"{self._pool_name}: no replica became ready in time",
                retry_after_s=_NO_REPLICA_RETRY_S,
            )
        self._meter.shed("expired")
        return OverloadedError(
            f"{self._pool_name}: no slot became free in time", retry_after_s=self._drain_s()
        )

    def _drain_s(self) -> float:
        """Return the time in which the queue drains, as a ``Retry-After``."""
        rate = self.capacity.drain_tokens_per_s()
        return _retry_s(self._queue.tokens / rate if rate else _NO_REPLICA_RETRY_S)


class _DisplacedError(OverloadedError):
    """A request of a higher class took the request's place in a full queue."""


def _is_evidence(slot: asyncio.Future[Slot]) -> bool:
    """Return True if a wait ended with a slot or at its deadline, not early for another reason."""
    return not slot.cancelled() and not isinstance(slot.exception(), _DisplacedError)


def _stopping() -> UnavailableError:
    return UnavailableError("The router is stopping.", retry_after_s=1)


def _retry_s(wait_s: float) -> float:
    return min(MAX_RETRY_S, max(1.0, wait_s))
