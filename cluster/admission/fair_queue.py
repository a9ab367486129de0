"""The queue before a pool: priority classes, weighted fair sharing, deadlines. Pure, O(log n).

Classes are strict: nothing of a lower one is served while a higher one waits. In a class tenants
share by start-time fair queueing (Goyal, Vin and Cheng, 1996) of token work: each has a tag, the
virtual time at which its next request starts; the smallest goes next and grows by work / weight.
Inside a tenant the earliest deadline goes first. Weight 0 waits below every class, so it is
served only when nobody else waits.
"""

from bisect import insort
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

BACKGROUND_RANK = -1000
"""The class of tenants with weight 0, below every priority."""
THRESHOLD = 8.0
"""A tenant may hold so many times what is free (dynamic thresholds, Choudhury and Hahne, 1998):
one flood takes 8/9 of the queue, n floods leave 1 / (8n + 1) of it to whoever comes."""

_SLACK = 16  # stale places that are not worth sweeping


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What a queue holds at most."""

    tokens: float
    entries: int


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One request that waits."""

    item: T
    tenant: str
    work_tokens: float
    """Its estimated work; above 0."""
    expires_s: float
    """When it is of no use any more, on the caller's clock."""
    weight: float = 1.0
    priority: int = 0
    """Higher goes first."""
    _flow: "_Flow[T] | None" = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """Its class; the highest is served first."""
        return _rank(self.weight, self.priority)


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    """One tenant in one class."""

    share: float
    tag: float
    entries: list[tuple[float, int, Entry[T]]] = field(default_factory=list)
    tokens: float = 0.0
    num: int = 0
    ticket: int = -1
    """Of its valid place in the class' heap; older places are skipped."""


@dataclass(slots=True, eq=False)
class _Class(Generic[T]):
    rank: int
    now: float = 0.0
    """Virtual time: the tag of the last request that was served."""
    flows: dict[str, _Flow[T]] = field(default_factory=dict)
    heap: list[tuple[float, int, _Flow[T]]] = field(default_factory=list)
    tokens: float = 0.0
    num: int = 0
    shares: float = 0.0
    """Sum over the tenants that wait."""


class FairQueue(Generic[T]):
    """Requests of many tenants in the order in which they are to be served."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.tokens = 0.0
        """Work that waits."""
        self._num = 0
        self._classes: dict[int, _Class[T]] = {}
        self._ranks: list[int] = []  # ascending
        self._sequence = count()

    def __len__(self) -> int:
        return self._num

    def push(self, entry: Entry[T]) -> bool:
        """Queue an entry; False: it finds no room, in the queue or in its tenant's part of it."""
        group = self._class(entry.rank)
        flow = group.flows.get(entry.tenant)
        if not self._has_room(flow, entry.work_tokens):
            return False
        if flow is None:
            flow = group.flows[entry.tenant] = _Flow(_share(entry.weight), group.now)
        if not flow.num:
            flow.share, flow.tag = _share(entry.weight), max(flow.tag, group.now)
            group.shares += flow.share
            self._place(group, flow)
        elif flow.share != _share(entry.weight):  # its weight was changed
            group.shares += _share(entry.weight) - flow.share
            flow.share = _share(entry.weight)
        entry._flow = flow
        heappush(flow.entries, (entry.expires_s, next(self._sequence), entry))
        self._count(group, flow, 1, entry.work_tokens)
        return True

    def peek(self) -> Entry[T] | None:
        """The entry to serve next; None where nothing waits."""
        for rank in reversed(self._ranks):
            group = self._classes[rank]
            if group.num and (flow := self._first(group)) is not None:
                return self._head(flow)
        return None

    def pop(self) -> Entry[T]:
        """Take what ``peek`` shows; its tenant is charged for it.

        Raises:
            IndexError: nothing waits.
        """
        entry = self.peek()
        if entry is None:
            raise IndexError("nothing waits")
        group, flow = self._classes[entry.rank], entry._flow
        assert flow is not None
        group.now = max(group.now, flow.tag)
        flow.tag += entry.work_tokens / flow.share
        self.remove(entry)
        if flow.num:
            self._place(group, flow)
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Take an entry out unserved; one that is not in the queue is left alone."""
        flow = entry._flow
        if flow is None:
            return
        group = self._classes[entry.rank]
        entry._flow = None
        self._count(group, flow, -1, -entry.work_tokens)
        if not flow.num:
            group.shares -= flow.share
            flow.entries.clear()
        elif len(flow.entries) > 2 * flow.num + _SLACK:
            flow.entries = [one for one in flow.entries if one[2]._flow is flow]
            heapify(flow.entries)
        if not group.num:  # nobody is owed anything
            self._classes[group.rank] = _Class(group.rank)

    def charge(self, tenant: str, priority: int, weight: float, tokens: float) -> None:
        """Charge a waiting tenant for work that no entry stood for, or (below 0) pay it back:
        an estimate that was wrong, or what another router served it."""
        group = self._classes.get(_rank(weight, priority))
        flow = group.flows.get(tenant) if group else None
        if group is None or flow is None:
            return
        flow.tag = max(group.now, flow.tag + tokens / flow.share)
        if flow.num:
            self._place(group, flow)

    def tokens_before(self, entry: Entry[T]) -> float:
        """The work that is served before a new ``entry``, if nobody else comes."""
        before = sum(self._classes[rank].tokens for rank in self._ranks if rank > entry.rank)
        group = self._classes.get(entry.rank)
        if group is None:
            return before
        flow, share = group.flows.get(entry.tenant), _share(entry.weight)
        own, shares = (flow.tokens, group.shares) if flow and flow.num else (0.0, group.shares)
        if not (flow and flow.num):
            shares += share
        # While it works off its own tokens, the others get their shares and no more than they have.
        others = min(group.tokens - own, (own + entry.work_tokens) * (shares - share) / share)
        return before + own + others

    def drain(self) -> list[Entry[T]]:
        """Take out everything, in no order."""
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

    def _has_room(self, flow: _Flow[T] | None, work: float) -> bool:
        own_num, own_tokens = (flow.num, flow.tokens) if flow else (0, 0.0)
        if own_num + 1 > THRESHOLD * (self.limits.entries - self._num):
            return False
        # A request that is larger than the queue may wait alone.
        free = self.limits.tokens - self.tokens
        return not self._num or (work <= free and own_tokens + work <= THRESHOLD * free)

    def _class(self, rank: int) -> _Class[T]:
        group = self._classes.get(rank)
        if group is None:
            group = self._classes[rank] = _Class(rank)
            insort(self._ranks, rank)
        return group

    def _first(self, group: _Class[T]) -> _Flow[T] | None:
        """The flow with the smallest tag; drops places that are not valid any more."""
        heap = group.heap
        while heap:
            _, ticket, flow = heap[0]
            if flow.num and flow.ticket == ticket:
                return flow
            heappop(heap)
        return None

    def _head(self, flow: _Flow[T]) -> Entry[T]:
        while flow.entries[0][2]._flow is not flow:  # it was removed
            heappop(flow.entries)
        return flow.entries[0][2]

    def _place(self, group: _Class[T], flow: _Flow[T]) -> None:
        flow.ticket = next(self._sequence)
        heappush(group.heap, (flow.tag, flow.ticket, flow))
        if len(group.heap) > 2 * len(group.flows) + _SLACK:
            group.heap = [place for place in group.heap if place[1] == place[2].ticket]
            heapify(group.heap)

    def _count(self, group: _Class[T], flow: _Flow[T], num: int, tokens: float) -> None:
        for holder in (group, flow):
            holder.num += num
            holder.tokens = holder.tokens + tokens if holder.num else 0.0
        self._num += num
        self.tokens = self.tokens + tokens if self._num else 0.0


def _rank(weight: float, priority: int) -> int:
    return priority if weight > 0 else BACKGROUND_RANK


def _share(weight: float) -> float:
    """Tenants of weight 0 share evenly among themselves."""
    return weight if weight > 0 else 1.0
