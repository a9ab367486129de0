"""Queue of one pool: priority classes, weighted fair sharing, deadlines. Pure; O(log n).

Priority classes are strict: a class is served only while all higher ones are empty. Within a class,
tenants share by start-time fair queueing (Goyal, Vin and Cheng, 1996) of token work: each tenant
has a tag, the virtual time at which its next request starts. The smallest tag is served next and
grows by work / weight. Within a tenant, the earliest deadline is served first. Tenants of weight 0
are in a class below all others, so they are served only if no other tenant waits.

A full queue makes room for a higher class by displacing entries of lower ones.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

BACKGROUND_RANK = -1000
"""Rank of the class of tenants with weight 0, below every priority."""
THRESHOLD = 8.0
"""Limit of a tenant's part of the queue, in all classes, as a multiple of the free space (dynamic
thresholds, Choudhury and Hahne, 1998). One flooding tenant fills 8/9 of the queue; n of them leave
1 / (8n + 1) of it to others."""

_SLACK = 16  # stale heap items that are not worth sweeping


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a queue."""

    tokens: float
    """Estimated work of all entries."""
    entries: int


@dataclass(slots=True, eq=False)
class QueueEntry(Generic[T]):
    """A queued request."""

    item: T
    tenant: str
    work_tokens: float
    """Estimated work, above 0."""
    expires_s: float
    """Deadline by which it must be served, on the caller's clock."""
    weight: float = 1.0
    priority: int = 0
    """Higher is served first."""
    _flow: "_Flow[T] | None" = field(default=None, repr=False)  # set while it is queued

    @property
    def rank(self) -> int:
        """Rank of its class; the highest is served first."""
        return rank_of(self.weight, self.priority)


@dataclass(slots=True)
class _Total:
    """Sums over entries."""

    num: int = 0
    tokens: float = 0.0

    def add(self, num: int, tokens: float) -> None:
        self.num += num
        self.tokens = self.tokens + tokens if self.num else 0.0


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    """One tenant's entries in one class."""

    tenant: str
    weight: float
    tag: float
    entries: list[tuple[float, int, QueueEntry[T]]] = field(default_factory=list)
    """Heap by deadline; removed entries stay until they are swept."""
    tokens: float = 0.0
    num: int = 0
    ticket: int = -1
    """Identifies the flow's valid item in the class's heap; older ones are skipped."""


@dataclass(slots=True, eq=False)
class _Class(Generic[T]):
    rank: int
    virtual_time: float = 0.0
    """Tag of the last request that was served."""
    flows: dict[str, _Flow[T]] = field(default_factory=dict)
    waiting: dict[str, _Flow[T]] = field(default_factory=dict)
    """Flows that have entries."""
    heap: list[tuple[float, int, _Flow[T]]] = field(default_factory=list)
    """Flows by tag."""
    tokens: float = 0.0
    num: int = 0
    weights: float = 0.0
    """Sum over the flows that have entries."""


class FairQueue(Generic[T]):
    """Requests of many tenants in the order in which they are to be served."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._total = _Total()
        self._by_tenant: dict[str, _Total] = {}  # of the tenants that have entries
        self._classes: dict[int, _Class[T]] = {}
        self._ranks: list[int] = []  # ascending
        self._sequence = count()

    def __len__(self) -> int:
        return self._total.num

    @property
    def tokens(self) -> float:
        """Estimated work of all entries."""
        return self._total.tokens

    @property
    def num_heap_items(self) -> int:
        """Items in all heaps, stale ones included; bounds the memory."""
        groups = self._classes.values()
        flows = [flow for group in groups for flow in group.flows.values()]
        return sum(len(group.heap) for group in groups) + sum(len(flow.entries) for flow in flows)

    def num_of(self, tenant: str) -> int:
        """Return the number of a tenant's entries."""
        of_tenant = self._by_tenant.get(tenant)
        return of_tenant.num if of_tenant else 0

    def push(self, entry: QueueEntry[T], *, is_limited: bool = True) -> bool:
        """Queue an entry; return False if the queue or its tenant's part of it is full.

        ``displace`` may then make room. An entry that is not ``is_limited`` always fits.
        """
        group = self._class_of(entry.rank)
        flow = group.flows.get(entry.tenant)
        if is_limited and not self._has_room(entry, _Total(), _Total()):
            return False
        weight = _effective_weight(entry.weight)
        if flow is None:
            flow = group.flows[entry.tenant] = _Flow(entry.tenant, weight, group.virtual_time)
        if not flow.num:
            flow.weight, flow.tag = weight, max(flow.tag, group.virtual_time)
            group.weights += weight
            self._schedule(group, flow)
        elif flow.weight != weight:  # the tenant's weight was changed
            group.weights += weight - flow.weight
            flow.weight = weight
        entry._flow = flow
        heappush(flow.entries, (entry.expires_s, next(self._sequence), entry))
        self._count(group, flow, 1, entry.work_tokens)
        return True

    def peek(self) -> QueueEntry[T] | None:
        """Return the entry to serve next; None if the queue is empty."""
        for rank in reversed(self._ranks):
            group = self._classes[rank]
            if group.num and (flow := self._first_flow(group)) is not None:
                return self._first_entry(flow)
        return None

    def peek_without_backlog(self, max_entries: int) -> QueueEntry[T] | None:
        """Return the next entry in the top class among tenants with at most ``max_entries``.

        Takes a time in proportion to the number of tenants that wait.
        """
        first = self.peek()
        if first is None:
            return None
        waiting = self._classes[first.rank].waiting.values()
        small = [flow for flow in waiting if self.num_of(flow.tenant) <= max_entries]
        return self._first_entry(min(small, key=lambda flow: flow.tag)) if small else None

    def pop(self) -> QueueEntry[T]:
        """Remove and return the entry of ``peek``, and charge its tenant.

        Raises:
            IndexError: the queue is empty.
        """
        entry = self.peek()
        if entry is None:
            raise IndexError("the queue is empty")
        self.take(entry)
        return entry

    def take(self, entry: QueueEntry[T]) -> None:
        """Remove a queued entry that is served, and charge its tenant."""
        group, flow = self._classes[entry.rank], entry._flow
        assert flow is not None
        # An entry may be served before the first one; virtual time must not pass that one's tag.
        first = self._first_flow(group)
        first_tag = flow.tag if first is None else min(flow.tag, first.tag)
        group.virtual_time = max(group.virtual_time, first_tag)
        flow.tag += entry.work_tokens / flow.weight
        self.remove(entry)
        if flow.num:
            self._schedule(group, flow)

    def remove(self, entry: QueueEntry[T]) -> None:
        """Remove an entry without serving it; no effect if it is not queued."""
        flow = entry._flow
        if flow is None:
            return
        group = self._classes[entry.rank]
        entry._flow = None
        self._count(group, flow, -1, -entry.work_tokens)
        if not flow.num:
            group.weights -= flow.weight
            flow.entries.clear()
        elif len(flow.entries) > 2 * flow.num + _SLACK:
            flow.entries = [one for one in flow.entries if one[2]._flow is flow]
            heapify(flow.entries)
        if not group.num:  # an empty class forgets its tags: no tenant is owed anything
            self._classes[group.rank] = _Class(group.rank)

    def displace(self, entry: QueueEntry[T]) -> list[QueueEntry[T]]:
        """Remove entries of lower classes to make room for ``entry``, and return them.

        Nothing is removed if that does not suffice.
        """
        freed, freed_of_tenant = _Total(), _Total()
        displaced = []
        for loser in self._least_urgent(entry.rank):
            displaced.append(loser)
            freed.add(1, loser.work_tokens)
            if loser.tenant == entry.tenant:
                freed_of_tenant.add(1, loser.work_tokens)
            if self._has_room(entry, freed, freed_of_tenant):
                for one in displaced:
                    self.remove(one)
                return displaced
        return []

    def charge(self, tenant: str, priority: int, weight: float, tokens: float) -> None:
        """Correct a queued tenant's tag by work that its entries did not stand for.

        Args:
            tenant: The tenant; no effect if it has no entry in the class.
            priority: Priority of the class.
            weight: The tenant's weight.
            tokens: The work; below 0 if a request did less than estimated.
        """
        group = self._classes.get(rank_of(weight, priority))
        flow = group.flows.get(tenant) if group else None
        if group is None or flow is None:
            return
        flow.tag = max(group.virtual_time, flow.tag + tokens / flow.weight)
        if flow.num:
            self._schedule(group, flow)

    def charge_all(self, tenant: str, tokens: float) -> None:
        """Charge a tenant in every class where it waits, in proportion to its queued work there."""
        flows = [(g, f) for g in self._classes.values() if (f := g.flows.get(tenant)) and f.num]
        queued_tokens = sum(flow.tokens for _, flow in flows)
        for group, flow in flows:
            flow.tag += tokens * flow.tokens / queued_tokens / flow.weight
            self._schedule(group, flow)

    def tokens_before(self, entry: QueueEntry[T]) -> float:
        """Return the work that is served before a new ``entry`` if no other request arrives."""
        higher = sum(self._classes[rank].tokens for rank in self._ranks if rank > entry.rank)
        group = self._classes.get(entry.rank)
        if group is None:
            return higher
        weight, weights, same_tenant = _effective_weight(entry.weight), group.weights, 0.0
        flow = group.flows.get(entry.tenant)
        if flow and flow.num:
            same_tenant = flow.tokens
        else:
            weights += weight
        # While the tenant's tokens are worked off, the others get their shares, but no more than
        # they have queued.
        others_share = (same_tenant + entry.work_tokens) * (weights - weight) / weight
        return higher + same_tenant + min(group.tokens - same_tenant, others_share)

    def drain(self) -> list[QueueEntry[T]]:
        """Remove and return all entries, in no order."""
        left = [
            entry
            for group in self._classes.values()
            for flow in group.flows.values()
            for _, _, entry in flow.entries
            if entry._flow is flow
        ]
        for entry in left:
            self.remove(entry)
        return left

    def _has_room(self, entry: QueueEntry[T], freed: _Total, freed_of_tenant: _Total) -> bool:
        """Return True if ``entry`` fits once other entries are gone, some of them of its tenant."""
        of_tenant = self._by_tenant.get(entry.tenant) or _Total()
        free_entries = self.limits.entries - self._total.num + freed.num
        if of_tenant.num - freed_of_tenant.num + 1 > THRESHOLD * free_entries:
            return False
        if self._total.num == freed.num:  # a request larger than the queue may wait alone
            return True
        free_tokens = self.limits.tokens - self._total.tokens + freed.tokens
        tenant_tokens = of_tenant.tokens - freed_of_tenant.tokens + entry.work_tokens
        return entry.work_tokens <= free_tokens and tenant_tokens <= THRESHOLD * free_tokens

    def _least_urgent(self, below_rank: int) -> Iterator[QueueEntry[T]]:
        """Yield the entries of lower classes: the lowest class first, and its largest tenant."""
        for rank in self._ranks:
            if rank >= below_rank:
                return
            # The entries of each tenant, the latest deadline last.
            left = [
                sorted(item for item in flow.entries if item[2]._flow is flow)
                for flow in self._classes[rank].flows.values()
                if flow.num
            ]
            while left:
                largest = max(left, key=len)
                yield largest.pop()[2]
                if not largest:
                    left.remove(largest)

    def _class_of(self, rank: int) -> _Class[T]:
        group = self._classes.get(rank)
        if group is None:
            group = self._classes[rank] = _Class(rank)
            insort(self._ranks, rank)
        return group

    def _first_flow(self, group: _Class[T]) -> _Flow[T] | None:
        """Return the flow with the smallest tag; drop stale heap items on the way."""
        heap = group.heap
        while heap:
            _, ticket, flow = heap[0]
            if flow.num and flow.ticket == ticket:
                return flow
            heappop(heap)
        return None

    def _first_entry(self, flow: _Flow[T]) -> QueueEntry[T]:
        while flow.entries[0][2]._flow is not flow:  # it was removed
            heappop(flow.entries)
        return flow.entries[0][2]

    def _schedule(self, group: _Class[T], flow: _Flow[T]) -> None:
        """Put a flow into its class's heap under its current tag."""
        flow.ticket = next(self._sequence)
        heappush(group.heap, (flow.tag, flow.ticket, flow))
        if len(group.heap) > 2 * len(group.flows) + _SLACK:
            group.heap = [item for item in group.heap if item[1] == item[2].ticket]
            heapify(group.heap)

    def _count(self, group: _Class[T], flow: _Flow[T], num: int, tokens: float) -> None:
        for holder in (group, flow):
            holder.num += num
            holder.tokens = holder.tokens + tokens if holder.num else 0.0
        if flow.num:
            group.waiting[flow.tenant] = flow
        else:
            group.waiting.pop(flow.tenant, None)
        self._total.add(num, tokens)
        of_tenant = self._by_tenant.setdefault(flow.tenant, _Total())
        of_tenant.add(num, tokens)
        if not of_tenant.num:
            del self._by_tenant[flow.tenant]


def rank_of(weight: float, priority: int) -> int:
    """Return the rank of the class of a tenant's requests; the highest is served first."""
    return priority if weight > 0 else BACKGROUND_RANK


def _effective_weight(weight: float) -> float:
    """Return the weight within a class; tenants of weight 0 share their class evenly."""
    return weight if weight > 0 else 1.0
