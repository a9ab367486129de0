"""The requests that wait for a place in one pool: the fair queue, its timers and its refusals.

Knows no replica: how a place is found is given to it. Every request that comes in ends here
exactly once, with a place or a typed error.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.admission import FairQueue, PoolCapacity, QueueEntry, QueueLimits
from cluster.errors import OverloadedError, RequestError, UnavailableError
from cluster.gateway.pools.claim import Claim
from cluster.gateway.recording.observer import PoolMeter
from cluster.load import Load

P = TypeVar("P")

MAX_RETRY_S = 60.0
_NO_REPLICA_RETRY_S = 5.0
_MARGIN = 1.5  # a wait is a guess, overload keeps it at the edge, and a shorter queue costs nothing
_MEMORY = 0.996  # of how waits turned out; much slower than the queue, or the two swing together
_MOST_ERROR = 4.0
_UNKNOWN = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class SlotSource(Generic[P]):
    """How places at a pool's replicas are taken and given back."""

    take: Callable[[Claim], P | None]
    """A place, already counted as taken; None where no replica has room. UnavailableError where
    none can have any."""
    give_back: Callable[[P], None]
    """One that its request did not want any more; may call ``dispatch``."""
    any_ready: Callable[[], bool]
    """Whether any replica runs."""


Waiter = tuple[Claim, asyncio.Future[P]]


class AdmissionQueue(Generic[P]):
    """Gives places to requests in the queue's order, as far as the pool's capacity goes."""

    def __init__(
        self,
        name: str,
        limits: QueueLimits,
        capacity: PoolCapacity,
        places: SlotSource[P],
        meter: PoolMeter,
    ) -> None:
        self.capacity = capacity
        self._name = name
        self._places = places
        self._meter = meter
        self._queue: FairQueue[Waiter[P]] = FairQueue(limits)
        self._closed = False
        # By tenant, the seconds that it waited and that were guessed; the ratio is above 1 mostly
        # because others go on coming.
        self._waits: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> float:
        """Estimated work that waits."""
        return self._queue.tokens

    async def place(self, claim: Claim) -> P:
        """A place, at once or after a wait.

        Raises:
            OverloadedError: the queue is full, or the place would come or came too late.
            UnavailableError: the wait was too long and no replica runs, none that runs can answer,
                or the router stops.
        """
        if self._closed:
            raise stopping()
        if not self._queue:
            if claim.has_deadline:
                self._refuse_hopeless(claim, 0.0)
            if (place := self._take(claim)) is not None:
                return place
        return await self._wait(claim)

    def leave(self, claim: Claim, done_tokens: float | None, seconds: float) -> None:
        """A request that had a place has ended.

        Args:
            claim: The request's.
            done_tokens: What it took; 0 where it failed, None where that is not known.
            seconds: How long it had the place.
        """
        self.capacity.remove_request(claim.work_tokens, done_tokens or 0.0, seconds)
        if done_tokens is not None:
            tenant = claim.identity.tenant
            excess = done_tokens - claim.work_tokens
            self._queue.charge(tenant.name, claim.priority, tenant.weight, excess)

    def charge(self, tenant: str, tokens: float) -> None:
        """Another router served a tenant that waits here, so the others here go first for that."""
        self._queue.charge_all(tenant, tokens)

    def observe(self, loads: Iterable[Load]) -> None:
        """Take in the replicas' reports."""
        self.capacity.observe_loads(loads, asyncio.get_running_loop().time())

    def dispatch(self) -> None:
        """Give what places there are to those who wait."""
        while (entry := self._queue.peek()) is not None:
            claim, future = entry.item
            if future.done():  # its waiter was cancelled and has not run yet
                self._queue.remove(entry)
            elif claim.has_deadline and self._is_late(claim):
                self._queue.remove(entry)
                future.set_exception(self._too_late(claim))
            else:
                self._give(entry)
                if not future.done():
                    return

    def _give(self, entry: QueueEntry[Waiter[P]]) -> None:
        """Give the first in the queue a place, if there is one; an error, if none can come."""
        claim, future = entry.item
        try:
            place = self._take(claim)
        except UnavailableError as error:
            self._queue.remove(entry)
            future.set_exception(error)
            return
        if place is not None:
            self._queue.pop()
            future.set_result(place)

    def _take(self, claim: Claim) -> P | None:
        if not self.capacity.has_room(claim.work_tokens):
            return None
        place = self._places.take(claim)
        if place is not None:
            self.capacity.add_request(claim.work_tokens)
        return place

    def close(self) -> None:
        """Tell all who wait, and all who still come, that the router stops."""
        self._closed = True
        for entry in self._queue.drain():
            if not entry.item[1].done():
                entry.item[1].set_exception(stopping())

    async def _wait(self, claim: Claim) -> P:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[P] = loop.create_future()
        tenant = claim.identity.tenant
        entry: QueueEntry[Waiter[P]] = QueueEntry(
            (claim, future),
            tenant.name,
            claim.work_tokens,
            claim.expires_s,
            tenant.weight,
            claim.priority,
        )
        guess_s = self._wait_s(entry)
        waited_s, guessed_s = self._waits.get(tenant.name, _UNKNOWN)
        wait_s = guess_s * min(_MOST_ERROR, waited_s / guessed_s)
        self._refuse_hopeless(claim, wait_s)
        if not self._queue.push(entry):
            self._meter.shed("queue_full")
            raise OverloadedError(
                f"{self._name}: too many requests are waiting already",
                retry_after_s=_retry_s(wait_s),
            )
        timer = loop.call_at(claim.expires_s, self._expire, entry)
        began_s = loop.time()
        try:
            return await future
        except asyncio.CancelledError:
            self._queue.remove(entry)
            # The place may have been granted in the same pass in which its waiter left.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._places.give_back(future.result())
            raise
        finally:
            timer.cancel()
            self._learn(tenant.name, guess_s, loop.time() - began_s)

    def _learn(self, tenant: str, guess_s: float, waited_s: float) -> None:
        if guess_s > 0:
            waited, guessed = self._waits.get(tenant, _UNKNOWN)
            self._waits[tenant] = waited * _MEMORY + waited_s, guessed * _MEMORY + guess_s

    def _wait_s(self, entry: QueueEntry[Waiter[P]]) -> float:
        """How long it will take until a new entry is served; 0 while that is not known."""
        rate = self.capacity.drain_tokens_per_s() if self._places.any_ready() else None
        return self._queue.tokens_before(entry) / rate if rate else 0.0

    def _refuse_hopeless(self, claim: Claim, wait_s: float) -> None:
        if self._is_hopeless(claim, wait_s):
            in_time = claim.has_deadline
            self._meter.shed("deadline" if in_time else "too_long")
            what = "answered within its time" if in_time else "served in time"
            raise OverloadedError(
                f"{self._name}: it cannot be {what}; {wait_s:.1f} s of work are before it",
                retry_after_s=_retry_s(wait_s),
            )

    def _is_hopeless(self, claim: Claim, wait_s: float) -> bool:
        starts_s = asyncio.get_running_loop().time() + wait_s * _MARGIN
        if starts_s > claim.expires_s:
            return True
        # Who waits behind others is judged by what is usual: these go on showing how long it is.
        served = self.capacity.average_request_s if wait_s else self.capacity.best_request_s
        return starts_s + served(claim.work_tokens) > claim.deadline_s

    def _is_late(self, claim: Claim) -> bool:
        """Whether the request that is next would be answered too late, by what is usual; where
        nobody is behind it, who would be served instead, even the best pace must not suffice.
        """
        served = (
            self.capacity.average_request_s
            if len(self._queue) > 1
            else self.capacity.best_request_s
        )
        return asyncio.get_running_loop().time() + served(claim.work_tokens) > claim.deadline_s

    def _expire(self, entry: QueueEntry[Waiter[P]]) -> None:
        claim, future = entry.item
        self._queue.remove(entry)
        if not future.done():
            future.set_exception(self._too_late(claim))

    def _too_late(self, claim: Claim) -> RequestError:
        if not self._places.any_ready():
            return UnavailableError(
                f"{self._name}: no replica became ready in time",
                retry_after_s=_NO_REPLICA_RETRY_S,
            )
        self._meter.shed("expired")
        rate = self.capacity.drain_tokens_per_s()
        wait_s = self._queue.tokens / rate if rate else _NO_REPLICA_RETRY_S
        return OverloadedError(f"{self._name}: no place in time", retry_after_s=_retry_s(wait_s))


def stopping() -> UnavailableError:
    """The error of requests that a router which stops cannot answer."""
    return UnavailableError("the router is stopping", retry_after_s=1)


def _retry_s(wait_s: float) -> float:
    return min(MAX_RETRY_S, max(1.0, wait_s))
