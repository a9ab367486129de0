"""Admission queue of one pool: fair order, deadlines, and the refusals.

Every request ends here exactly once, with a slot or a typed error. A request is refused as soon as
its estimated wait exceeds its timeout, so that clients can go elsewhere at once.
"""

import asyncio
from collections.abc import Iterable

from cluster.admission import FairQueue, PoolCapacity, QueueEntry, QueueLimits
from cluster.errors import OverloadedError, RequestError, UnavailableError
from cluster.gateway.pools.slots import Claim, Slot, SlotSource
from cluster.gateway.recording.observer import PoolMeter
from cluster.load import Load
from cluster.usage import Usage

MAX_RETRY_S = 60.0
"""Upper limit of the ``Retry-After`` header."""
_NO_REPLICA_RETRY_S = 5.0
# Refuse if 1.5 times the estimated wait exceeds the timeout: the estimate is uncertain, overload
# keeps every wait at the limit, and a shorter queue costs no throughput.
_WAIT_MARGIN = 1.5
# Decay per request of the estimates' past errors. Much slower than the queue turns over: at the
# same speed, queue length and correction oscillate together.
_ERROR_DECAY = 0.996
_MAX_CORRECTION = 4.0
_NO_WAITS = (1.0, 1.0)

Waiter = tuple[Claim, asyncio.Future[Slot]]


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
        self._closed = False
        # Actual and estimated seconds that each tenant waited. Their ratio corrects the next
        # estimate; it is mostly above 1, because requests of other tenants keep arriving.
        self._waits: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> float:
        """Estimated work of the requests in the queue, in tokens."""
        return self._queue.tokens

    async def take_slot(self, claim: Claim) -> Slot:
        """Return a slot, at once or after a wait; give it back with ``release_slot``.

        Raises:
            OverloadedError: The queue is full, or the slot would come or came too late.
            UnavailableError: No replica became ready in time, no running replica can serve the
                request, or the router is stopping.
        """
        if self._closed:
            raise _stopping()
        if not self._queue:
            if claim.has_deadline:
                self._refuse_if_late(claim, 0.0)
            if (slot := self._try_slot(claim)) is not None:
                return slot
        return await self._wait(claim)

    def release_slot(
        self, slot: Slot, done_tokens: float | None = 0.0, usage: Usage | None = None
    ) -> None:
        """Release the slot of a request that has ended.

        Args:
            slot: Returned by ``take_slot``.
            done_tokens: Work that was done; 0 if the request failed, None if unknown.
            usage: Usage of the request, if the replica reported it.
        """
        claim, held_s = slot.claim, self._slots.release_slot(slot, usage)
        self.capacity.remove_request(claim.work_tokens, done_tokens or 0.0, held_s)
        if done_tokens is not None:
            tenant = claim.identity.tenant
            excess = done_tokens - claim.work_tokens
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
        while (entry := self._queue.peek()) is not None:
            claim, future = entry.item
            if future.done():  # cancelled, but its task has not run since
                self._queue.remove(entry)
            elif claim.has_deadline and self._will_miss_deadline(claim):
                self._queue.remove(entry)
                future.set_exception(self._too_late())
            else:
                self._offer_slot(entry)
                if not future.done():
                    return

    def close(self) -> None:
        """Reject the requests in the queue and all later ones: the router is stopping."""
        self._closed = True
        for entry in self._queue.drain():
            if not entry.item[1].done():
                entry.item[1].set_exception(_stopping())

    def _offer_slot(self, entry: QueueEntry[Waiter]) -> None:
        claim, future = entry.item
        try:
            slot = self._try_slot(claim)
        except UnavailableError as error:
            self._queue.remove(entry)
            future.set_exception(error)
            return
        if slot is not None:
            self._queue.pop()
            future.set_result(slot)

    def _try_slot(self, claim: Claim) -> Slot | None:
        if not self.capacity.has_room(claim.work_tokens):
            return None
        slot = self._slots.take_slot(claim)
        if slot is not None:
            self.capacity.add_request(claim.work_tokens)
        return slot

    async def _wait(self, claim: Claim) -> Slot:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Slot] = loop.create_future()
        tenant = claim.identity.tenant
        entry: QueueEntry[Waiter] = QueueEntry(
            (claim, future),
            tenant.name,
            claim.work_tokens,
            claim.expires_s,
            tenant.weight,
            claim.priority,
        )
        estimated_s = self._estimate_wait_s(entry)
        actual_sum_s, estimated_sum_s = self._waits.get(tenant.name, _NO_WAITS)
        wait_s = estimated_s * min(_MAX_CORRECTION, actual_sum_s / estimated_sum_s)
        self._refuse_if_late(claim, wait_s)
        if not self._queue.push(entry):
            self._meter.shed("queue_full")
            raise OverloadedError(
                f"{self._pool_name}: the queue is full", retry_after_s=_retry_s(wait_s)
            )
        timer = loop.call_at(claim.expires_s, self._expire, entry)
        since_s = loop.time()
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
            self._learn_wait(tenant.name, estimated_s, loop.time() - since_s)

    def _learn_wait(self, tenant: str, estimated_s: float, actual_s: float) -> None:
        if estimated_s > 0:
            actual_sum_s, estimated_sum_s = self._waits.get(tenant, _NO_WAITS)
            self._waits[tenant] = (
                actual_sum_s * _ERROR_DECAY + actual_s,
                estimated_sum_s * _ERROR_DECAY + estimated_s,
            )

    def _estimate_wait_s(self, entry: QueueEntry[Waiter]) -> float:
        """Return the wait of a new entry in seconds; 0 if no drain rate is known yet."""
        rate = self.capacity.drain_tokens_per_s() if self._slots.num_ready else None
        return self._queue.tokens_before(entry) / rate if rate else 0.0

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
        # Use the best duration only for a request that would start now: if every request were
        # refused, no new duration would be measured and a bad average would stay.
        duration_s = self.capacity.average_request_s if wait_s else self.capacity.best_request_s
        return start_s + duration_s(claim.work_tokens) > claim.deadline_s

    def _will_miss_deadline(self, claim: Claim) -> bool:
        # An average duration suffices to skip the first request if another one can have its slot.
        alone = len(self._queue) <= 1
        duration_s = self.capacity.best_request_s if alone else self.capacity.average_request_s
        end_s = asyncio.get_running_loop().time() + duration_s(claim.work_tokens)
        return end_s > claim.deadline_s

    def _expire(self, entry: QueueEntry[Waiter]) -> None:
        _, future = entry.item
        self._queue.remove(entry)
        if not future.done():
            future.set_exception(self._too_late())

    def _too_late(self) -> RequestError:
        if not self._slots.num_ready:
            return UnavailableError(
                f"{self._pool_name}: no replica became ready in time",
                retry_after_s=_NO_REPLICA_RETRY_S,
            )
        self._meter.shed("expired")
        rate = self.capacity.drain_tokens_per_s()
        wait_s = self._queue.tokens / rate if rate else _NO_REPLICA_RETRY_S
        return OverloadedError(
            f"{self._pool_name}: no slot became free in time", retry_after_s=_retry_s(wait_s)
        )


def _stopping() -> UnavailableError:
    return UnavailableError("The router is stopping.", retry_after_s=1)


def _retry_s(wait_s: float) -> float:
    return min(MAX_RETRY_S, max(1.0, wait_s))
