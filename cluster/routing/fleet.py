"""Replicas of one pool as the routing policies see them.

Keeps three things of each replica: what this router placed there, the last load report, and the
speed learned from finished requests. Events keep the table of numbers up to date, so a decision
only reads arrays. The clock is the time of the last ``advance``. Knows no policy.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from cluster.load import Load
from cluster.routing.adapters import LoadedAdapters
from cluster.routing.rates import ReplicaSpeeds, prefill_work_tokens
from cluster.routing.replica_state import Placement, ReplicaState
from cluster.routing.request import RequestView
from cluster.routing.table import BoolArray, FloatArray, Reach, ReplicaTable
from cluster.usage import Usage

USUAL_BATCH = 64.0
"""Streams that an engine decodes together for about the price of one. A guess; the pool's mean
number of requests per replica replaces it if that is larger."""
MIN_LEFT = 0.1
"""Share of a request's expected completion that is assumed to be left until the request ends."""
ASSIGNED_HALF_LIFE_S = 30.0
"""Time after which assigned work counts half."""
REFRESH_S = 1.0
MEAN_WEIGHT = 0.02
"""Weight of the newest request in the means that stand for other routers' requests."""
_UNKNOWN_LOAD = Load()


class Fleet:
    """Replicas of one pool; not thread-safe.

    Methods that take a replica's id raise KeyError if the replica is unknown.
    """

    def __init__(self, max_adapters: int = 1) -> None:
        self.now_s = 0.0
        self.ids: list[str | None] = []
        """Replica id of each row."""
        self.version = 0
        """Number of replicas ever added or removed."""
        self.table = ReplicaTable()
        """Numbers that policies read; only the fleet writes them."""
        self.adapters = LoadedAdapters(max_adapters)
        self.speeds = ReplicaSpeeds()
        """Speeds learned from finished requests."""
        self.mean_assigned_s = 0.0
        """Mean of ``table.assigned_s`` over the open rows; exact after each refresh, and
        approximated between two."""
        self._replicas: dict[str, ReplicaState] = {}
        self._free_rows: list[int] = []
        # Heap of (expected end of the prefill, number, request) for unobservable first tokens.
        self._expected_first_tokens: list[tuple[float, int, Placement]] = []
        self._num_expected = 0
        self._refreshed_s = 0.0
        self._num_in_flight = 0.0  # other routers' included
        self._mean_work_tokens = 512.0  # of a request's prefill; a guess until requests come
        self._mean_completion_tokens = 0.0

    def __len__(self) -> int:
        return len(self._replicas)

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._replicas

    # -- membership --

    def add(self, replica_id: str, capacity: int, reach: Reach = Reach.USUAL) -> None:
        """Add a replica that may have ``capacity`` requests in flight.

        Raises:
            ValueError: the fleet has the replica already.
        """
        if replica_id in self._replicas:
            raise ValueError(f"replica {replica_id} is already in the fleet")
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self._replicas[replica_id] = replica = ReplicaState(replica_id, row, capacity, reach)
        self.ids[row] = replica_id
        self.table.assigned_s[row] = self.mean_assigned_s
        self.version += 1
        self._update_speed(replica)

    def remove(self, replica_id: str) -> None:
        """Remove a replica; its requests in flight may still end, without any effect."""
        replica = self._replicas.pop(replica_id)
        self._num_in_flight -= replica.in_flight + replica.others_in_flight
        self.table.clear_row(replica.row)
        self.adapters.forget_row(replica.row)
        self.speeds.reset_row(replica.row)
        self.ids[replica.row] = None
        self._free_rows.append(replica.row)
        replica.queue.clear()
        replica.row = -1
        self.version += 1

    def set_reach(self, replica_id: str, reach: Reach) -> None:
        replica, assigned_s = self._replicas[replica_id], self.table.assigned_s
        if reach > replica.reach:  # it gets its share from now on, without catching up
            assigned_s[replica.row] = max(assigned_s[replica.row], self.mean_assigned_s)
        replica.reach = reach
        self._update_row(replica)

    def set_capacity(self, replica_id: str, capacity: int) -> None:
        replica = self._replicas[replica_id]
        replica.capacity = capacity
        self._update_row(replica)

    @contextmanager
    def hide(self, replica_ids: Iterable[str]) -> Iterator[None]:
        """Treat these replicas as unreachable within the context, which makes one choice."""
        rows = np.zeros(len(self.table), np.bool_)
        rows[[self._replicas[each].row for each in replica_ids]] = True
        with self.table.hide_rows(rows):
            yield

    def row_of(self, replica_id: str) -> int:
        return self._replicas[replica_id].row

    def in_flight(self, replica_id: str) -> int:
        """Return a replica's requests in flight, other routers' included."""
        return int(self.table.in_flight[self._replicas[replica_id].row])

    def has_room(self, replica_id: str) -> bool:
        """Return True if a replica may have another request in flight."""
        return self.in_flight(replica_id) < self._replicas[replica_id].capacity

    # -- events --

    def advance(self, now_s: float) -> None:
        """Set the clock, which may jump in either direction."""
        elapsed_s = now_s - self._refreshed_s
        self.now_s = now_s
        expected = self._expected_first_tokens
        while expected and expected[0][0] <= now_s:
            self._end_prefill(heapq.heappop(expected)[2])
        if not 0.0 <= elapsed_s < REFRESH_S:
            self._refresh(max(0.0, elapsed_s))
            self._refreshed_s = now_s

    def place(self, replica_id: str, request: RequestView, cached_tokens: float = 0.0) -> Placement:
        """Record that a request goes to a replica, with the prompt tokens expected in its cache."""
        replica = self._replicas[replica_id]
        work_tokens = prefill_work_tokens(request.prompt_tokens, cached_tokens)
        placement = Placement(replica, request, cached_tokens, work_tokens, self.now_s)
        replica.push(placement)
        self._num_in_flight += 1.0
        decode_s = request.completion_tokens * replica.decode_token_s
        self._assign(replica, work_tokens * replica.prefill_token_s + decode_s / USUAL_BATCH)
        if len(replica.queue) == 1:
            self._start_head(replica)
        if request.adapter is not None:
            self.adapters.record_use(replica.row, request.adapter)
        self._mean_work_tokens += MEAN_WEIGHT * (work_tokens - self._mean_work_tokens)
        completion_excess = request.completion_tokens - self._mean_completion_tokens
        self._mean_completion_tokens += MEAN_WEIGHT * completion_excess
        self._update_row(replica)
        return placement

    def record_first_token(self, placement: Placement) -> None:
        """Record that the first token of a request came; repeated calls have no effect."""
        replica = placement.replica
        if replica.row < 0 or placement.is_over or placement.is_first_token_seen:
            return
        if placement.prefilled_s is None:
            self._end_prefill(placement)
        else:  # it was expected sooner
            replica.correct_first_token(placement, self.now_s)
            self._update_row(replica)
        placement.is_first_token_seen = True

    def end(self, placement: Placement, usage: Usage | None = None) -> None:
        """Record that a request ended; repeated calls have no effect.

        The replica's rates are learned from the usage of a successful request.
        """
        replica = placement.replica
        if placement.is_over or replica.row < 0:
            return
        placement.is_over = True
        if placement.prefilled_s is None:
            self._leave_queue(placement)
        if usage is not None:
            # Correct the assigned work by the error of its estimate.
            work_tokens = prefill_work_tokens(usage.prompt_tokens, usage.cached_tokens)
            surplus_tokens = work_tokens - placement.work_tokens
            self._assign(replica, surplus_tokens * replica.prefill_token_s)
            self.speeds.learn(placement, usage, self.now_s)
        replica.discard(placement)
        self._num_in_flight -= 1.0
        self._update_speed(replica)

    def update_load(self, replica_id: str, load: Load) -> None:
        """Apply a replica's load report.

        A report can only add to this router's own count: a replica that claims to be idle is not
        believed, and one that claims more than its capacity counts as full.
        """
        replica = self._replicas[replica_id]
        before = replica.others_in_flight
        replica.update_load(load, self.now_s)
        self._num_in_flight += replica.others_in_flight - before
        self._update_row(replica)

    def forget_load(self, replica_id: str) -> None:
        self.update_load(replica_id, _UNKNOWN_LOAD)

    def forget_speed(self, replica_id: str) -> None:
        """Assume the pool's usual speed for a replica again."""
        replica = self._replicas[replica_id]
        self.speeds.reset_row(replica.row)
        self._update_speed(replica)

    # -- comparison with the other replicas; NaN if their speed is unknown --

    def expected_first_s(self, placement: Placement) -> float:
        """Return the time in seconds to the first token of a new request if peers had its queue."""
        replica = placement.replica
        queued_tokens = replica.queued_tokens + replica.others_waiting * self._mean_work_tokens
        return self.speeds.peers_s(replica.row, queued_tokens, 0.0)

    def times_s(self, placement: Placement, usage: Usage) -> tuple[float, float]:
        """Return the time that a request took until now, and the time that it takes peers."""
        replica, begun_s = placement.replica, placement.begun_s
        if placement.prefilled_s is None:  # it waited for the requests before it
            begun_s = max(begun_s, replica.last_first_token_s)
        work_tokens = prefill_work_tokens(usage.prompt_tokens, usage.cached_tokens)
        peers_s = self.speeds.peers_s(replica.row, work_tokens, usage.completion_tokens)
        return self.now_s - begun_s, peers_s

    # -- decisions: one number for each row --

    def open_rows(self) -> BoolArray:
        return self.table.open_rows()

    def work_s(self, decode_weight: float = 1.0) -> FloatArray:
        """Return the seconds of prefill and decode work ahead of a new request, per row.

        A second of decoding costs ``decode_weight`` (above 0) times a second of prefill.
        """
        return self.table.work_s(self.now_s, decode_weight / self._batch_size())

    def costs_s(
        self,
        decode_weight: float = 1.0,
        prompt_tokens: float = 0.0,
        share_s: float = math.inf,
        max_excess_s: float = 0.0,
    ) -> FloatArray:
        """Return ``work_s`` with further costs, per row; see ``ReplicaTable.costs_s``."""
        weight = decode_weight / self._batch_size()
        return self.table.costs_s(self.now_s, weight, prompt_tokens, share_s, max_excess_s)

    # -- internals --

    def _grow(self) -> None:
        old_size = len(self.table)
        size = self.table.grow()
        self.speeds.grow(size)
        self.adapters.grow(size)
        self.ids += [None] * (size - old_size)
        self._free_rows += range(size - 1, old_size - 1, -1)

    def _batch_size(self) -> float:
        return max(USUAL_BATCH, self._num_in_flight / max(1, len(self._replicas)))

    def _refresh(self, elapsed_s: float) -> None:
        self.speeds.refresh(elapsed_s)
        self.table.assigned_s *= 0.5 ** (elapsed_s / ASSIGNED_HALF_LIFE_S)
        open_rows = self.table.open_rows()
        if open_rows.any():
            self.mean_assigned_s = float(self.table.assigned_s[open_rows].mean())
        for replica in self._replicas.values():
            self._update_speed(replica)

    def _assign(self, replica: ReplicaState, work_s: float) -> None:
        self.table.assigned_s[replica.row] += work_s
        self.mean_assigned_s += work_s / len(self._replicas)

    def _update_speed(self, replica: ReplicaState) -> None:
        """Update a row after its learned rates may have changed."""
        table, row = self.table, replica.row
        replica.prefill_token_s = 1.0 / float(self.speeds.prefill.values[row])
        replica.decode_token_s = 1.0 / float(self.speeds.stream.values[row])
        table.miss_s[row] = replica.prefill_token_s
        claims = float(self.speeds.cache_claims.values[row])
        table.hit_s[row] = replica.prefill_token_s * claims
        self._update_row(replica)

    def _update_row(self, replica: ReplicaState) -> None:
        table, row = self.table, replica.row
        prefill_token_s, decode_token_s = replica.prefill_token_s, replica.decode_token_s
        in_flight = replica.in_flight + replica.others_in_flight
        table.in_flight[row] = in_flight
        available = replica.reach if in_flight < replica.capacity else Reach.NONE
        if available != replica.available:
            replica.available = available
            table.set_available(row, available)
        queued_tokens = replica.queued_tokens + replica.others_waiting * self._mean_work_tokens
        if replica.queue:
            head_tokens = next(iter(replica.queue)).work_tokens
            queued_tokens -= head_tokens
            table.has_head[row] = 1.0
            table.head_due_s[row] = replica.head_since_s + head_tokens * prefill_token_s
        else:
            table.has_head[row] = table.head_due_s[row] = 0.0
        # With a full KV cache, a new request waits until about one other has ended.
        full_s = self._mean_completion_tokens * decode_token_s if replica.is_kv_full else 0.0
        table.behind_s[row] = max(0.0, queued_tokens) * prefill_token_s + full_s
        # Other routers' requests are assumed to be half done on average.
        others_tokens = replica.others_in_flight * 0.5 * self._mean_completion_tokens
        table.num_decoding[row] = replica.num_decoding
        table.decode_end_sum_s[row] = (
            replica.completion_tokens + others_tokens
        ) * decode_token_s + replica.first_token_sum_s
        min_left = replica.completion_tokens * MIN_LEFT + others_tokens
        table.decode_floor_s[row] = min_left * decode_token_s

    def _end_prefill(self, placement: Placement) -> None:
        """Move a request from the queue to decoding, unless it has moved or ended."""
        replica = placement.replica
        if placement.prefilled_s is None and placement in replica.queue:
            self._leave_queue(placement)
            replica.begin_decoding(placement, self.now_s)
            self._update_row(replica)

    def _leave_queue(self, placement: Placement) -> None:
        replica = placement.replica
        placement.begun_s = max(placement.begun_s, replica.last_first_token_s)
        replica.last_first_token_s = self.now_s
        was_head = next(iter(replica.queue)) is placement
        del replica.queue[placement]
        replica.queued_tokens -= placement.work_tokens
        if was_head:
            self._start_head(replica)

    def _start_head(self, replica: ReplicaState) -> None:
        """Begin the prefill of the request that is the queue's head now."""
        head = next(iter(replica.queue), None)
        if head is None:
            replica.queued_tokens = 0.0  # clears rounding errors
            return
        replica.head_since_s = max(head.begun_s, replica.last_first_token_s)
        if not head.request.streamed:
            prefill_s = head.work_tokens / float(self.speeds.prefill.values[replica.row])
            self._num_expected += 1
            expected = (replica.head_since_s + prefill_s, self._num_expected, head)
            heapq.heappush(self._expected_first_tokens, expected)
