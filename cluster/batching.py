"""Token-budget batcher: requests of one to thousands of texts in, batches of texts out.

The batcher owns the waiting texts and is fair between requests (fair queueing of Demers, Keshav and
Shenker 1989, with tokens as the work). A request is split into portions of one batch each; a
portion's tag is the virtual time at which fair sharing would have finished it. Each batch contains
the text with the smallest tag, filled up with texts of similar length among those next in order.
Requests that fit one batch are therefore finished one after the other. Sharing every batch evenly
would finish them all together, late, and then idle until their clients send the next requests.

Pure state: no clock, no lock, no knowledge of texts beyond their length.
"""

import bisect
import heapq
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

GRAINS = 4
"""Size steps per batch in which requests are compared. Sizes within one step count as equal, so a
slightly smaller request does not overtake an earlier one."""


@dataclass(frozen=True, slots=True)
class Item(Generic[K]):
    """One text of a batch: number ``index`` of the request ``key``."""

    key: K
    index: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch(Generic[K]):
    """Texts to compute together, by ascending length."""

    task: str
    items: tuple[Item[K], ...]
    num_tokens: int


@dataclass(slots=True, eq=False)
class _WaitingRequest(Generic[K]):
    key: K
    task: str
    lengths: Sequence[int]
    order: list[int]
    """Indices by descending length, so that neighbours need little padding."""
    number: int
    undrawn_tokens: int
    next: int = 0
    portion_tokens: int = 0
    """Undrawn tokens of the current portion."""
    unserved_tokens: int = 0
    unserved_texts: int = 0
    cancelled: bool = False

    def start_portion(self, max_tokens: int) -> int:
        """Return the portion's work in tokens, rounded down to whole grains."""
        self.portion_tokens = min(self.undrawn_tokens, max_tokens)
        grain = max(1, max_tokens // GRAINS)
        return self.portion_tokens // grain * grain

    def draw(self) -> tuple[int, int]:
        """Return the next text's rank in ``order`` and its length."""
        rank, length = self.next, self.lengths[self.order[self.next]]
        self.next += 1
        self.undrawn_tokens -= length
        self.portion_tokens -= length
        return rank, length


class _Candidate(NamedTuple):
    """Text that may be in the next batch; sorts by length, then in fair order."""

    length: int
    tag: float
    number: int
    rank: int
    """Index in the request's ``order``."""
    request: _WaitingRequest[Any]


_fair_order = operator.itemgetter(1, 2, 3)  # tag, number, rank: unique per candidate


class Batcher(Generic[K]):
    """Cuts batches of one task and at most ``max_batch_tokens``, fairly between requests.

    A text longer than the budget gets a batch for itself. A text waits for at most as many batches
    as texts were before it in fair order. A request finishes later than under fair sharing by at
    most one batch per waiting request.

    Args:
        max_batch_tokens: Budget of a batch.
        lookahead: Texts of similar length are chosen from the next ``lookahead`` batches' worth of
            tokens; 1 keeps the fair order.
    """

    def __init__(self, max_batch_tokens: int, lookahead: int = 4) -> None:
        self._budget = max_batch_tokens
        self._window_tokens = max_batch_tokens * lookahead
        self._requests: dict[K, _WaitingRequest[K]] = {}
        self._heap: list[tuple[float, int, _WaitingRequest[K]]] = []
        """Requests with undrawn texts, by the tag of their portion and their unique number."""
        self._window: list[_Candidate] = []
        self._virtual_time = 0.0
        self._num_added = 0
        self.waiting_tokens = 0
        """Tokens of all waiting texts."""
        self.waiting_texts = 0
        self.skipped_texts = 0
        """Texts cancelled before they were in a batch, since the start."""

    @property
    def waiting_requests(self) -> int:
        return len(self._requests)

    def add_request(self, key: K, task: str, lengths: Sequence[int]) -> None:
        """Queue the texts of a request; the caller must not change ``lengths`` afterwards.

        Raises:
            ValueError: A request with this key is waiting.
        """
        if key in self._requests:
            raise ValueError(f"a request with the key {key!r} is already waiting")
        if not lengths:
            return
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        tokens = sum(lengths)
        request = _WaitingRequest(key, task, lengths, order, self._num_added, tokens)
        request.unserved_texts, request.unserved_tokens = len(lengths), tokens
        self._num_added += 1
        self.waiting_texts += len(lengths)
        self.waiting_tokens += tokens
        self._requests[key] = request
        tag = self._virtual_time + request.start_portion(self._budget)
        heapq.heappush(self._heap, (tag, request.number, request))

    def cancel_request(self, key: K) -> int:
        """Skip the waiting texts of a request and return their number; 0 if it is unknown."""
        request = self._requests.pop(key, None)
        if request is None:
            return 0
        request.cancelled = True
        self.waiting_texts -= request.unserved_texts
        self.waiting_tokens -= request.unserved_tokens
        self.skipped_texts += request.unserved_texts
        return request.unserved_texts

    def cut_batch(self, max_tokens: int | None = None) -> Batch[K] | None:
        """Remove and return the next batch, or None if no text waits.

        Args:
            max_tokens: Budget of this batch, if smaller than ``max_batch_tokens``.
        """
        budget = min(self._budget, max_tokens or self._budget)
        self._fill_window()
        if not self._window:
            return None
        head = min(self._window, key=_fair_order)
        task = head.request.task
        alike = sorted(text for text in self._window if text.request.task == task)
        run = _run_around(alike, bisect.bisect_left(alike, head), budget)
        self._window = [text for text in self._window if text.request.task != task]
        self._window += alike[: run.start] + alike[run.stop :]
        self._virtual_time = max(self._virtual_time, head.tag - self._budget)
        return self._serve(task, alike[run])

    def _fill_window(self) -> None:
        self._window = [text for text in self._window if not text.request.cancelled]
        tokens = sum(text.length for text in self._window)
        while self._heap and tokens < self._window_tokens:
            tag, number, request = self._heap[0]
            if request.cancelled:
                heapq.heappop(self._heap)
                continue
            rank, length = request.draw()
            self._window.append(_Candidate(length, tag, number, rank, request))
            tokens += length
            if request.next == len(request.order):
                heapq.heappop(self._heap)
            elif request.portion_tokens <= 0:
                overdrawn = -request.portion_tokens  # the last text may exceed the portion
                tag += overdrawn + request.start_portion(self._budget)
                heapq.heapreplace(self._heap, (tag, number, request))

    def _serve(self, task: str, texts: list[_Candidate]) -> Batch[K]:
        num_requests = len(self._requests)
        tokens = sum(text.length for text in texts)
        for text in texts:
            request = text.request
            request.unserved_texts -= 1
            request.unserved_tokens -= text.length
            if not request.unserved_texts:
                del self._requests[request.key]
        self.waiting_texts -= len(texts)
        self.waiting_tokens -= tokens
        self._virtual_time += tokens / num_requests  # the fair share of each request
        items = tuple(Item(t.request.key, t.request.order[t.rank], t.length) for t in texts)
        return Batch(task, items, tokens)


def _run_around(alike: list[_Candidate], head: int, budget: int) -> slice:
    """Return the run of texts nearest in length to ``alike[head]`` that fits the budget."""
    low, high = head, head + 1
    length = alike[head].length
    left = budget - length
    while True:
        longer = alike[high].length if high < len(alike) else left + 1
        shorter = alike[low - 1].length if low else left + 1
        if longer <= left and (shorter > left or longer - length <= length - shorter):
            left -= longer
            high += 1
        elif shorter <= left:
            left -= shorter
            low -= 1
        else:
            return slice(low, high)


def group_by_length(lengths: Sequence[int], max_padding: float = 0.0) -> list[slice]:
    """Cut ascending lengths into runs that are worth padding to the run's last length.

    Args:
        lengths: Lengths in ascending order.
        max_padding: Largest share of a run's cells that may be padding, 0 to 1. With 0, all
            lengths of a run are equal.
    """
    groups: list[slice] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        cells = (index + 1 - start) * length
        if index > start and cells - tokens - length > max_padding * cells:
            groups.append(slice(start, index))
            start, tokens = index, 0
        tokens += length
    if lengths:
        groups.append(slice(start, len(lengths)))
    return groups
