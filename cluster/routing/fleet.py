"""The replicas of one pool as the policies see them.

Owns what this router gave to each replica, what each says of itself, and how fast each was found
to be. Everything is kept up to date by events, so a decision reads a few arrays and builds none.
Time is what ``advance`` was last told. Knows no policy.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from cluster.load import Load
from cluster.routing.adapters import Adapters
from cluster.routing.arrays import BoolArray, FloatArray
from cluster.routing.placement import Placement, Row
from cluster.routing.rates import LearnedRates
from cluster.routing.request import RequestView
from cluster.routing.slots import Reach, Slots
from cluster.usage import Usage

_UNKNOWN_LOAD = Load()

STEP_TOKENS = 64.0
"""What a request costs beside its uncached tokens, in prompt tokens: a step of the engine has a
price of its own. A guess between a CPU's (about 40) and a large GPU's (some hundreds)."""
PREFILL_PRIOR = 4000.0
"""Prompt tokens a second, before anything was measured."""
DECODE_PRIOR = 30.0
"""Tokens a second of one stream, before anything was measured."""
USUAL_BATCH = 64.0
"""Streams that an engine decodes beside each other for about the price of one; a guess that gives
way to the pool's mean where that is larger."""
LEAST_LEFT = 0.1
"""Of what was expected of a request, the share that it is taken to still generate at least."""
KV_FULL = 0.95
"""Use of the KV cache at which a new request may have to wait until another one ends."""
GIVEN_HALF_S = 30.0
"""Seconds after which work that was given counts half."""
REFRESH_S = 1.0
MEAN_WEIGHT = 0.02
"""Of the newest request, in the means that stand for other routers' requests."""


class Fleet:
    """The replicas of one pool; every method is called on one thread.

    Args:
        max_adapters: LoRA adapters that a replica has loaded at a time.
    """

    def __init__(self, max_adapters: int = 1) -> None:
        self.now_s = 0.0
        self.ids: list[str | None] = []
        """The replica of each slot."""
        self.version = 0
        """Grows with each replica that comes or goes."""
        self.slots = Slots()
        """What policies read and nobody else changes."""
        self.adapters = Adapters(max_adapters)
        self.prefill_rate = LearnedRates(PREFILL_PRIOR, 1.0)
        """Prompt tokens a second of each slot, with whatever decodes beside."""
        self.stream_rate = LearnedRates(DECODE_PRIOR, 1.0)
        """Tokens a second of one stream of each slot."""
        self.honesty = LearnedRates(1.0, 2000.0, pooled=False)
        """Of the tokens that each slot was expected to have cached, the share that it had."""
        self._rates = (self.prefill_rate, self.stream_rate, self.honesty)
        self._rows: dict[str, Row] = {}
        self._free: list[int] = []
        self.mean_given_s = 0.0
        """The mean of the work that was given to those that are open, in ``slots.given_s``; exact
        once a second, and between that what is given is added."""
        self._due: list[tuple[float, int, Placement]] = []
        self._num_due = 0
        self._refreshed_at = 0.0
        self._num_ongoing = 0.0
        self._mean_work = 512.0
        self._mean_completion = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._rows

    # Which replicas there are. An unknown replica is a KeyError.

    def add(self, replica_id: str, capacity: int, reach: Reach = Reach.USUAL) -> None:
        """Take in a replica that may be given ``capacity`` requests at a time; once."""
        if replica_id in self._rows:
            raise ValueError(f"{replica_id} is in the fleet already")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._rows[replica_id] = row = Row(replica_id, slot, capacity, reach)
        self.ids[slot] = replica_id
        self.slots.given_s[slot] = self.mean_given_s
        self.version += 1
        self._write(row)

    def remove(self, replica_id: str) -> None:
        """Forget a replica; what it still has to end may end later, and counts no more."""
        row = self._rows.pop(replica_id)
        self._num_ongoing -= row.own + row.others
        self.slots.clear(row.slot)
        self.adapters.forget(row.slot)
        for rates in self._rates:
            rates.reset(row.slot)
        self.ids[row.slot] = None
        self._free.append(row.slot)
        row.queue.clear()
        row.slot = -1
        self.version += 1

    def set_reach(self, replica_id: str, reach: Reach) -> None:
        """Say how a replica can be reached from now on."""
        row, given_s = self._rows[replica_id], self.slots.given_s
        if reach > row.reach:  # it is to get its share from now on, not what it missed
            given_s[row.slot] = max(given_s[row.slot], self.mean_given_s)
        row.reach = reach
        self._write(row)

    @contextmanager
    def hidden(self, replica_ids: Iterable[str]) -> Iterator[None]:
        """For one choice, have these replicas pass for ones that cannot be reached."""
        hidden = np.zeros(len(self.slots), np.bool_)
        hidden[[self._rows[each].slot for each in replica_ids]] = True
        with self.slots.hidden(hidden):
            yield

    def set_capacity(self, replica_id: str, capacity: int) -> None:
        """Say how many requests a replica may be given at a time from now on."""
        row = self._rows[replica_id]
        row.capacity = capacity
        self._write(row)

    def slot_of(self, replica_id: str) -> int:
        """The place of a replica in the arrays."""
        return self._rows[replica_id].slot

    def ongoing(self, replica_id: str) -> int:
        """Requests that a replica has, this router's and the others'."""
        return int(self.slots.ongoing[self._rows[replica_id].slot])

    # What happens

    def advance(self, now_s: float) -> None:
        """Say what time it is; a clock that jumps is followed."""
        elapsed = now_s - self._refreshed_at
        self.now_s = now_s
        while self._due and self._due[0][0] <= now_s:
            self._prefilled(heapq.heappop(self._due)[2])
        if not 0.0 <= elapsed < REFRESH_S:
            self._refresh(max(0.0, elapsed))
            self._refreshed_at = now_s

    def placed(
        self, replica_id: str, request: RequestView, cached_tokens: float = 0.0
    ) -> Placement:
        """Note that a replica is given a request.

        Args:
            replica_id: Which replica.
            request: What it is given.
            cached_tokens: Prompt tokens that it is expected to have cached.
        """
        row = self._rows[replica_id]
        work = max(0.0, request.prompt_tokens - cached_tokens) + STEP_TOKENS
        placement = Placement(row, request, cached_tokens, work, self.now_s)
        row.own += 1
        row.queued_tokens += work
        row.decode_tokens += request.completion_tokens
        self._num_ongoing += 1.0
        decode_s = request.completion_tokens / float(self.stream_rate.values[row.slot])
        self._give(row, work * float(self.slots.miss_s[row.slot]) + decode_s / USUAL_BATCH)
        row.queue[placement] = None
        if len(row.queue) == 1:
            self._set_head(row)
        if request.adapter is not None:
            self.adapters.note(row.slot, request.adapter)
        self._mean_work += MEAN_WEIGHT * (work - self._mean_work)
        self._mean_completion += MEAN_WEIGHT * (request.completion_tokens - self._mean_completion)
        self._write(row)
        return placement

    def first_token(self, placement: Placement) -> None:
        """Note that the first token of a request came; later calls are nothing."""
        row = placement.row
        if row.slot < 0 or placement.is_over or placement.is_first_seen:
            return
        if placement.prefilled_at is None:
            self._prefilled(placement)
        else:  # it was expected sooner
            row.first_at_sum += self.now_s - placement.prefilled_at
            placement.prefilled_at = self.now_s
            self._write(row)
        placement.is_first_seen = True

    def ended(self, placement: Placement, usage: Usage | None = None) -> None:
        """Note that a request ended, in whatever way; a second time is nothing.

        Args:
            placement: What ``placed`` gave.
            usage: What it took, where it ended well; the replica's rates are learned from it.
        """
        row = placement.row
        if placement.is_over or row.slot < 0:
            return
        placement.is_over = True
        if placement.prefilled_at is None:
            self._leave_queue(placement)
        else:
            row.decoding -= 1
            row.first_at_sum -= placement.prefilled_at
        if usage is not None:
            self._learn(placement, usage)
        row.own -= 1
        self._num_ongoing -= 1.0
        row.decode_tokens -= placement.request.completion_tokens
        if row.own == 0:  # what rounding left goes too
            row.decode_tokens = row.first_at_sum = row.queued_tokens = 0.0
        self._write(row)

    def update_load(self, replica_id: str, load: Load) -> None:
        """Take in a replica's load report.

        A report can only add to this router's own count: a replica that claims to be idle is not
        believed, and one that claims more than its capacity counts as full.
        """
        row = self._rows[replica_id]
        others = min(max(0.0, float(load.in_flight - row.own)), float(row.capacity))
        self._num_ongoing += others - row.others
        row.others = others
        share = others / max(1.0, row.own + others)
        row.others_waiting = min(max(0.0, load.waiting * share), others)
        row.is_kv_full = load.kv_cache_usage > KV_FULL
        self._write(row)

    def forget_load(self, replica_id: str) -> None:
        """Forget a replica's last load report."""
        self.update_load(replica_id, _UNKNOWN_LOAD)

    # What a decision reads; one number for each slot

    def open(self) -> BoolArray:
        """Which slots may be given a request now; not to be changed."""
        return self.slots.open()

    def work_s(self, decode_weight: float = 1.0) -> FloatArray:
        """Seconds of prefill and decode that each slot has before it.

        Args:
            decode_weight: What a second of decoding counts against one of prefill, above 0.
        """
        return self.slots.work_s(self.now_s, decode_weight / self._batch())

    def costs_s(
        self,
        decode_weight: float = 1.0,
        prompt_tokens: float = 0.0,
        share_s: float = math.inf,
        most_s: float = 0.0,
    ) -> FloatArray:
        """The same, with more that counts against a slot; inf for one that is not open.

        Args:
            decode_weight: As for ``work_s``.
            prompt_tokens: Whose prefill is added.
            share_s: Of the work that a slot was given, what is above it is added,
            most_s: but never more than so much.
        """
        weight = decode_weight / self._batch()
        return self.slots.costs_s(self.now_s, weight, prompt_tokens, share_s, most_s)

    # Inner

    def _grow(self) -> None:
        old = len(self.slots)
        size = self.slots.grow()
        for rates in self._rates:
            rates.grow(size)
        self.adapters.grow(size)
        self.ids += [None] * (size - old)
        self._free += range(size - 1, old - 1, -1)

    def _batch(self) -> float:
        """Streams that decode beside each other for about the price of one."""
        return max(USUAL_BATCH, self._num_ongoing / max(1, len(self._rows)))

    def _refresh(self, elapsed_s: float) -> None:
        """Take in that time has passed: what was learned long ago counts less."""
        for rates in self._rates:
            rates.refresh(elapsed_s)
        self.slots.given_s *= 0.5 ** (elapsed_s / GIVEN_HALF_S)
        allowed = self.slots.open()
        if allowed.any():
            self.mean_given_s = float(self.slots.given_s[allowed].mean())
        for row in self._rows.values():
            self._write(row)

    def _give(self, row: Row, work_s: float) -> None:
        self.slots.given_s[row.slot] += work_s
        self.mean_given_s += work_s / len(self._rows)

    def _write(self, row: Row) -> None:
        """Write into the arrays what has changed of a replica."""
        slots, slot = self.slots, row.slot
        token_s = 1.0 / float(self.prefill_rate.values[slot])
        decode_s = 1.0 / float(self.stream_rate.values[slot])
        slots.miss_s[slot] = token_s
        slots.hit_s[slot] = token_s * float(self.honesty.values[slot])
        slots.ongoing[slot] = ongoing = row.own + row.others
        slots.set_open(slot, ongoing < row.capacity, row.reach)
        queued = row.queued_tokens + row.others_waiting * self._mean_work
        if row.queue:
            head_tokens = next(iter(row.queue)).work_tokens
            queued -= head_tokens
            slots.busy[slot], slots.first_at[slot] = 1.0, row.head_since + head_tokens * token_s
        else:
            slots.busy[slot] = slots.first_at[slot] = 0.0
        full_s = self._mean_completion * decode_s if row.is_kv_full else 0.0
        slots.behind_s[slot] = max(0.0, queued) * token_s + full_s
        others = row.others * 0.5 * self._mean_completion
        slots.decoding[slot] = row.decoding
        slots.decode_ends[slot] = (row.decode_tokens + others) * decode_s + row.first_at_sum
        slots.decode_least[slot] = (row.decode_tokens * LEAST_LEFT + others) * decode_s

    def _prefilled(self, placement: Placement) -> None:
        """The prefill of a request has ended, unless that or its end is known already."""
        row = placement.row
        if placement.prefilled_at is None and placement in row.queue:
            self._leave_queue(placement)
            placement.prefilled_at = self.now_s
            row.decoding += 1
            row.first_at_sum += self.now_s
            self._write(row)

    def _leave_queue(self, placement: Placement) -> None:
        row = placement.row
        placement.begun_at = max(placement.begun_at, row.last_first_at)
        row.last_first_at = self.now_s
        was_head = next(iter(row.queue)) is placement
        del row.queue[placement]
        row.queued_tokens -= placement.work_tokens
        if was_head:
            self._set_head(row)

    def _set_head(self, row: Row) -> None:
        """Another request is first in line now."""
        head = next(iter(row.queue), None)
        if head is None:
            row.queued_tokens = 0.0  # what rounding left goes too
            return
        row.head_since = max(head.begun_at, row.last_first_at)
        if not head.request.streamed:
            expected_s = head.work_tokens / float(self.prefill_rate.values[row.slot])
            self._num_due += 1
            heapq.heappush(self._due, (row.head_since + expected_s, self._num_due, head))

    def _learn(self, placement: Placement, usage: Usage) -> None:
        """Take in how fast a replica was; a late answer to a wrong guess is not held against it."""
        slot, completion = placement.row.slot, usage.completion_tokens
        if placement.cached_tokens > 0.0:
            held = min(float(usage.cached_tokens), placement.cached_tokens)
            self.honesty.observe(slot, held, placement.cached_tokens)
        work = max(0.0, usage.prompt_tokens - usage.cached_tokens) + STEP_TOKENS
        self._give(placement.row, (work - placement.work_tokens) * float(self.slots.miss_s[slot]))
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
