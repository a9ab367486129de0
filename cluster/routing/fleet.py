"""The replicas of one pool as the policies see them.

Owns what this router gave to each replica, what each says of itself, and how fast each was found
to be. Everything is kept up to date by events, so a decision reads a few arrays and builds none.
Time is what ``advance`` was last told. Knows no policy.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cluster.routing.adapters import Adapters
from cluster.routing.arrays import BoolArray, FloatArray
from cluster.routing.rates import LearnedRates
from cluster.routing.request import RequestView, Usage
from cluster.routing.slots import NEVER, Reach, Slots

STEP_TOKENS = 64.0
"""What a request costs beside its uncached tokens, in prompt tokens: a step of the engine has a
price of its own. A guess between a CPU's (about 40) and a large GPU's (some hundreds)."""
PREFILL_PRIOR = 4000.0
"""Prompt tokens a second, before anything was measured."""
DECODE_PRIOR = 30.0
"""Tokens a second of one stream, before anything was measured."""
OVERDUE_MAX_S = 60.0
"""The most that a late first token, or a clock that jumped, counts."""
USUAL_BATCH = 32.0
"""Streams that an engine decodes beside each other for about the price of a few; a guess that
gives way to the pool's mean where that is larger."""
LEAST_LEFT = 0.1
"""Of what was expected of a request, the share that it is taken to still generate at least."""
KV_FULL = 0.95
"""Use of the KV cache at which a new request may have to wait until another one ends."""
REFRESH_S = 1.0
MEAN_WEIGHT = 0.02
"""Of the newest request, in the means that stand for other routers' requests."""


class _Row:
    """A replica's slot, and its requests in the order in which they wait for their prefill."""

    __slots__ = ("id", "last_first_at", "others", "queue", "slot")

    def __init__(self, replica_id: str, slot: int) -> None:
        self.id = replica_id
        self.slot = slot
        """-1 once it was removed."""
        self.others = 0.0
        self.queue: dict[Placement, None] = {}
        self.last_first_at = 0.0


@dataclass(eq=False, slots=True)
class Placement:
    """One request at one replica; made by ``Fleet.placed``, ended once by ``Fleet.ended``."""

    row: _Row
    request: RequestView
    cached_tokens: float
    """Prompt tokens that the replica was expected to have cached."""
    work_tokens: float
    """What its prefill was expected to cost, in tokens."""
    begun_at: float
    """When its prefill can have begun: when it was placed, or the one before had its token."""
    prefilled_at: float | None = None
    """When its first token came or, where that is not seen, was expected."""
    is_first_seen: bool = False
    is_over: bool = False


class Fleet:
    """The replicas of one pool; every method is called on one thread."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slots = Slots()
        """What policies read and nobody else changes."""
        self.prefill_rate = LearnedRates(PREFILL_PRIOR, 1.0)
        """Prompt tokens a second of each slot, with whatever decodes beside."""
        self.stream_rate = LearnedRates(DECODE_PRIOR, 1.0)
        """Tokens a second of one stream of each slot."""
        self.honesty = LearnedRates(1.0, 2000.0, pooled=False)
        """Of the tokens that each slot was expected to have cached, the share that it had."""
        self.adapters = Adapters()
        self.ids: list[str | None] = []
        """The replica of each slot."""
        self.version = 0
        """Grows with each replica that comes or goes."""
        self._rows: dict[str, _Row] = {}
        self._free: list[int] = []
        self._due: list[tuple[float, int, Placement]] = []
        self._num_due = 0
        self._refreshed_at = 0.0
        self._num_ongoing = 0.0
        self._num_others = 0.0
        self._kv_full: set[int] = set()
        self._mean_work = 512.0
        self._mean_completion = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._rows

    # Which replicas there are

    def add(self, replica_id: str, capacity: int, reach: Reach = Reach.USUAL) -> None:
        """Take in a replica that may be given ``capacity`` requests at a time; once."""
        if replica_id in self._rows:
            raise ValueError(f"{replica_id} is in the fleet already")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._rows[replica_id] = _Row(replica_id, slot)
        self.ids[slot] = replica_id
        self.slots.reach[slot] = reach
        self.slots.capacity[slot] = capacity
        self.slots.reopen(slot)
        self.version += 1

    def remove(self, replica_id: str) -> None:
        """Forget a replica; what it still has to end may end later, and counts no more."""
        row = self._rows.pop(replica_id)
        self._set_others(row, 0.0)
        self._num_ongoing -= float(self.slots.own[row.slot])
        self.slots.clear(row.slot)
        self.adapters.forget(row.slot)
        for rates in (self.prefill_rate, self.stream_rate, self.honesty):
            rates.reset(row.slot)
        self.ids[row.slot] = None
        self._free.append(row.slot)
        row.queue.clear()
        row.slot = -1
        self.version += 1

    def set_reach(self, replica_id: str, reach: Reach) -> None:
        """Say how a replica can be reached from now on."""
        slot = self._rows[replica_id].slot
        self.slots.reach[slot] = reach
        self.slots.reopen(slot)

    def set_capacity(self, replica_id: str, capacity: int) -> None:
        """Say how many requests a replica may be given at a time from now on."""
        slot = self._rows[replica_id].slot
        self.slots.capacity[slot] = capacity
        self.slots.reopen(slot)

    def slot_of(self, replica_id: str) -> int:
        """The place of a replica in the arrays; KeyError where it is unknown."""
        return self._rows[replica_id].slot

    def ongoing(self, replica_id: str) -> int:
        """Requests that a replica has, this router's and the others'."""
        return int(self.slots.ongoing[self._rows[replica_id].slot])

    def _grow(self) -> None:
        old = len(self.slots)
        size = self.slots.grow()
        for rates in (self.prefill_rate, self.stream_rate, self.honesty):
            rates.grow(size)
        self.adapters.grow(size)
        self.ids += [None] * (size - old)
        self._free += range(size - 1, old - 1, -1)

    # What happens

    def advance(self, now_s: float) -> None:
        """Say what time it is; a clock that goes back is followed."""
        elapsed = now_s - self._refreshed_at
        self.now_s = now_s
        while self._due and self._due[0][0] <= now_s:
            self._prefilled(heapq.heappop(self._due)[2])
        if not 0.0 <= elapsed < REFRESH_S:
            for rates in (self.prefill_rate, self.stream_rate, self.honesty):
                rates.refresh(max(0.0, elapsed))
            self._refreshed_at = now_s

    def placed(
        self, replica_id: str, request: RequestView, cached_tokens: float = 0.0
    ) -> Placement:
        """Note that a replica is given a request.

        Args:
            replica_id: Which replica; KeyError where it is unknown.
            request: What it is given.
            cached_tokens: Prompt tokens that it is expected to have cached.
        """
        row, slots = self._rows[replica_id], self.slots
        work = max(0.0, request.prompt_tokens - cached_tokens) + STEP_TOKENS
        placement = Placement(row, request, cached_tokens, work, self.now_s)
        slot = row.slot
        slots.own[slot] += 1.0
        slots.ongoing[slot] += 1.0
        self._num_ongoing += 1.0
        slots.reopen(slot)
        slots.behind[slot] += work
        slots.decode[slot] += request.completion_tokens
        row.queue[placement] = None
        if len(row.queue) == 1:
            self._set_head(row)
        if request.adapter is not None:
            self.adapters.note(slot, request.adapter)
        self._mean_work += MEAN_WEIGHT * (work - self._mean_work)
        self._mean_completion += MEAN_WEIGHT * (request.completion_tokens - self._mean_completion)
        return placement

    def first_token(self, placement: Placement) -> None:
        """Note that the first token of a request came; later calls are nothing."""
        slot = placement.row.slot
        if slot < 0 or placement.is_over or placement.is_first_seen:
            return
        if placement.prefilled_at is None:
            self._prefilled(placement)
        else:  # it was expected sooner
            self.slots.decoding_since[slot] += self.now_s - placement.prefilled_at
            placement.prefilled_at = self.now_s
        placement.is_first_seen = True

    def ended(self, placement: Placement, usage: Usage | None = None) -> None:
        """Note that a request ended, in whatever way; a second time is nothing.

        Args:
            placement: What ``placed`` gave.
            usage: What it took, where it ended well; the replica's rates are learned from it.
        """
        row, slots = placement.row, self.slots
        slot = row.slot
        if placement.is_over or slot < 0:
            return
        placement.is_over = True
        if placement.prefilled_at is None:
            self._leave_queue(placement)
        else:
            slots.decoding[slot] -= 1.0
            slots.decoding_since[slot] -= placement.prefilled_at
        if usage is not None:
            self._learn(placement, usage)
        slots.own[slot] -= 1.0
        slots.decode[slot] -= placement.request.completion_tokens
        if slots.own[slot] == 0.0:  # what rounding left goes too
            slots.decode[slot] = slots.decoding_since[slot] = 0.0
        self._num_ongoing -= 1.0
        slots.ongoing[slot] = slots.own[slot] + row.others
        slots.reopen(slot)

    def report(
        self, replica_id: str, *, ongoing: int, waiting: int = 0, kv_cache_usage: float = 0.0
    ) -> None:
        """Take in what a replica says of itself.

        It can only add to what this router knows that it gave: a replica that claims to be idle is
        not believed, and one that claims more than it can hold is taken for full.

        Args:
            replica_id: Which replica; KeyError where it is unknown.
            ongoing: Requests that it has, from all routers.
            waiting: Of these, the ones whose prefill has not begun.
            kv_cache_usage: Share of its KV cache in use, 0 to 1.
        """
        row, slots = self._rows[replica_id], self.slots
        slot = row.slot
        own, capacity = float(slots.own[slot]), float(slots.capacity[slot])
        others = min(max(0.0, ongoing - own), capacity)
        self._set_others(row, others)
        share = others / max(1.0, own + others)
        slots.others_waiting[slot] = min(max(0.0, waiting * share), others)
        slots.kv_cache_usage[slot] = kv_cache_usage
        if kv_cache_usage > KV_FULL:
            self._kv_full.add(slot)

    def unknown(self, replica_id: str) -> None:
        """Forget what a replica said of itself."""
        self.report(replica_id, ongoing=0)

    def loaded(self, replica_id: str, adapters: Iterable[str]) -> None:
        """Take in which adapters a replica has loaded."""
        self.adapters.replace(self._rows[replica_id].slot, adapters)

    # What a decision reads; one number for each slot

    def open(self) -> BoolArray:
        """Which slots may be given a request now."""
        return self.slots.open()

    def queue_s(self) -> FloatArray:
        """Seconds until a replica could begin with one more prompt.

        The first in line is taken for as late as it is overdue: a replica that gives no sign
        becomes less and less likely to be chosen.
        """
        slots, rate = self.slots, self.prefill_rate.values
        elapsed = np.minimum(np.maximum(self.now_s - slots.head_since, 0.0), OVERDUE_MAX_S)
        behind = slots.behind
        if self._num_others:
            behind = behind + slots.others_waiting * self._mean_work
        waiting: FloatArray = np.abs(slots.head / rate - elapsed) + behind / rate
        return waiting

    def decode_s(self) -> FloatArray:
        """Seconds of decoding that a replica has before it, in batches as large as usual."""
        slots, rate = self.slots, self.stream_rate.values
        done = (slots.decoding * self.now_s - slots.decoding_since) * rate
        left = np.maximum(slots.decode - done, LEAST_LEFT * slots.decode)
        if self._num_others:
            left += (0.5 * self._mean_completion) * (slots.ongoing - slots.own)
        mean_ongoing = (self._num_ongoing + self._num_others) / max(1, len(self._rows))
        seconds: FloatArray = left / (rate * max(USUAL_BATCH, mean_ongoing))
        if self._kv_full:
            full = list(self._kv_full)
            seconds[full] += self._mean_completion / rate[full]
        return seconds

    # Inner

    def _prefilled(self, placement: Placement) -> None:
        """The prefill of a request has ended, unless that or its end is known already."""
        row = placement.row
        if placement.prefilled_at is None and placement in row.queue:
            self._leave_queue(placement)
            placement.prefilled_at = self.now_s
            self.slots.decoding[row.slot] += 1.0
            self.slots.decoding_since[row.slot] += self.now_s

    def _leave_queue(self, placement: Placement) -> None:
        row = placement.row
        placement.begun_at = max(placement.begun_at, row.last_first_at)
        row.last_first_at = self.now_s
        was_head = next(iter(row.queue)) is placement
        del row.queue[placement]
        if was_head:
            self._set_head(row)
        else:
            self.slots.behind[row.slot] -= placement.work_tokens

    def _set_head(self, row: _Row) -> None:
        """Take in which request is first in line now."""
        slots, slot = self.slots, row.slot
        head = next(iter(row.queue), None)
        if head is None:
            slots.behind[slot] = slots.head[slot] = 0.0  # what rounding left goes too
            slots.head_since[slot] = NEVER
            return
        begun_at = max(head.begun_at, row.last_first_at)
        slots.head[slot] = head.work_tokens
        slots.behind[slot] -= head.work_tokens
        slots.head_since[slot] = begun_at
        if not head.request.streamed:
            expected_s = head.work_tokens / float(self.prefill_rate.values[slot])
            self._num_due += 1
            heapq.heappush(self._due, (begun_at + expected_s, self._num_due, head))

    def _set_others(self, row: _Row, others: float) -> None:
        """Take in how many requests a replica has from other routers."""
        self._num_others += others - row.others
        row.others = others
        self.slots.ongoing[row.slot] = self.slots.own[row.slot] + others
        self.slots.reopen(row.slot)
        self._kv_full.discard(row.slot)

    def _learn(self, placement: Placement, usage: Usage) -> None:
        """Take in how fast a replica was; a late answer to a wrong guess is not held against it."""
        slot, completion = placement.row.slot, usage.completion_tokens
        if placement.cached_tokens > 0.0:
            held = min(float(usage.cached_tokens), placement.cached_tokens)
            self.honesty.observe(slot, held, placement.cached_tokens)
        work = max(0.0, usage.prompt_tokens - usage.cached_tokens) + STEP_TOKENS
        whole_s = self.now_s - placement.begun_at
        if placement.is_first_seen and placement.prefilled_at is not None:
            decode_s = self.now_s - placement.prefilled_at
            completion -= 1
        else:  # only the whole is known; each part is taken to be as late as the whole
            expected_s = work / float(self.prefill_rate.values[slot])
            decode_s = completion / float(self.stream_rate.values[slot])
            decode_s *= whole_s / (expected_s + decode_s)
        self.prefill_rate.observe(slot, work, whole_s - decode_s)
        if completion > 0:
            self.stream_rate.observe(slot, completion, decode_s)
