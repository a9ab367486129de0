"""The token-budget batcher: requests of one or thousands of texts in, batches of texts out.

It owns what waits, and is fair between requests (fair queueing of Demers, Keshav and Shenker 1989,
with tokens as the work): a request goes in portions of a batch, and each has a tag, the virtual
time at which fair sharing would have finished it. A batch holds the text with the least tag; the
rest of it are texts near to that in length among those that come next. So requests that fit a batch
are finished one after the other: sharing every batch evenly would finish all of them together,
late, and leave nothing to compute until their clients ask again. It has no clock, no lock and no
idea of what a text is.
"""

import bisect
import heapq
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

GRAINS = 4
"""Of a batch; a request that is less than one larger than another is not put behind it for that."""


@dataclass(frozen=True, slots=True)
class Item(Generic[K]):
    """One text of a batch: the ``index``-th of the request ``key``."""

    key: K
    index: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch(Generic[K]):
    """Texts to compute together, in ascending order of length."""

    task: str
    items: tuple[Item[K], ...]
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Request(Generic[K]):
    key: K
    task: str
    lengths: Sequence[int]
    order: list[int]
    """Indices by descending length, so that neighbours are alike and padding costs least."""
    number: int
    undrawn_tokens: int
    next: int = 0
    portion_tokens: int = 0
    """What is not drawn yet of the portion that was begun."""
    unserved_tokens: int = 0
    unserved_texts: int = 0
    cancelled: bool = False

    def begin_portion(self, max_tokens: int) -> int:
        """Its work in tokens, in whole grains."""
        self.portion_tokens = min(self.undrawn_tokens, max_tokens)
        grain = max(1, max_tokens // GRAINS)
        return self.portion_tokens // grain * grain

    def draw(self) -> tuple[int, int]:
        """The next text's place in the order, and its length."""
        place, length = self.next, self.lengths[self.order[self.next]]
        self.next += 1
        self.undrawn_tokens -= length
        self.portion_tokens -= length
        return place, length


class _Drawn(NamedTuple):
    """A text that may be in the next batch; sorts by length, then in fair order."""

    length: int
    tag: float
    number: int
    place: int
    """Among the request's texts by descending length."""
    request: _Request[Any]


_turn = operator.itemgetter(1, 2, 3)  # no two are equal


class Batcher(Generic[K]):
    """Cuts batches of one task, at most ``max_batch_tokens`` long, fairly between requests.

    A text longer than the budget makes a batch of its own. A text waits for no more batches
    than texts stood before it in fair order; a request that is done later than fair sharing would
    have done it is so by no more than a batch for each request that waits.

    Args:
        max_batch_tokens: Tokens in a batch.
        lookahead: Texts of like length are sought among the next ``lookahead`` batches' worth of
            tokens; 1 keeps to the fair order.
    """

    def __init__(self, max_batch_tokens: int, lookahead: int = 4) -> None:
        self._budget = max_batch_tokens
        self._window_tokens = max_batch_tokens * lookahead
        self._requests: dict[K, _Request[K]] = {}
        self._heap: list[tuple[float, int, _Request[K]]] = []
        """Requests that have texts to be drawn, by their portion's tag and number (all differ)."""
        self._window: list[_Drawn] = []
        self._virtual_time = 0.0
        self._num_added = 0
        self.waiting_tokens = 0
        """Tokens of all texts that wait."""
        self.waiting_texts = 0
        self.skipped_texts = 0
        """Texts whose request was cancelled before they were in a batch, since the beginning."""

    @property
    def waiting_requests(self) -> int:
        """Requests with a text that waits."""
        return len(self._requests)

    def add(self, key: K, task: str, lengths: Sequence[int]) -> None:
        """Let the texts of a request wait; ``key`` must be new and ``lengths`` stay as they are."""
        if key in self._requests:
            raise ValueError("the request waits already")
        if not lengths:
            return
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        tokens = sum(lengths)
        request = _Request(key, task, lengths, order, self._num_added, tokens)
        request.unserved_texts, request.unserved_tokens = len(lengths), tokens
        self._num_added += 1
        self.waiting_texts += len(lengths)
        self.waiting_tokens += tokens
        self._requests[key] = request
        tag = self._virtual_time + request.begin_portion(self._budget)
        heapq.heappush(self._heap, (tag, request.number, request))

    def cancel(self, key: K) -> int:
        """Skip what still waits of a request; returns how many texts (0 if none or unknown)."""
        request = self._requests.pop(key, None)
        if request is None:
            return 0
        request.cancelled = True
        self.waiting_texts -= request.unserved_texts
        self.waiting_tokens -= request.unserved_tokens
        self.skipped_texts += request.unserved_texts
        return request.unserved_texts

    def cut(self, max_tokens: int | None = None) -> Batch[K] | None:
        """Take the next batch out, if need be a smaller one; None when nothing waits."""
        budget = min(self._budget, max_tokens or self._budget)
        self._fill_window()
        if not self._window:
            return None
        head = min(self._window, key=_turn)
        task = head.request.task
        alike = sorted(drawn for drawn in self._window if drawn.request.task == task)
        run = _run_around(alike, bisect.bisect_left(alike, head), budget)
        self._window = [drawn for drawn in self._window if drawn.request.task != task]
        self._window += alike[: run.start] + alike[run.stop :]
        self._virtual_time = max(self._virtual_time, head.tag - self._budget)
        return self._serve(task, alike[run])

    def _fill_window(self) -> None:
        self._window = [drawn for drawn in self._window if not drawn.request.cancelled]
        tokens = sum(drawn.length for drawn in self._window)
        while self._heap and tokens < self._window_tokens:
            tag, number, request = self._heap[0]
            if request.cancelled:
                heapq.heappop(self._heap)
                continue
            place, length = request.draw()
            self._window.append(_Drawn(length, tag, number, place, request))
            tokens += length
            if request.next == len(request.order):
                heapq.heappop(self._heap)
            elif request.portion_tokens <= 0:
                overdrawn = -request.portion_tokens  # by the end of a text
                tag += overdrawn + request.begin_portion(self._budget)
                heapq.heapreplace(self._heap, (tag, number, request))

    def _serve(self, task: str, chosen: list[_Drawn]) -> Batch[K]:
        num_requests = len(self._requests)
        tokens = sum(drawn.length for drawn in chosen)
        for drawn in chosen:
            request = drawn.request
            request.unserved_texts -= 1
            request.unserved_tokens -= drawn.length
            if not request.unserved_texts:
                del self._requests[request.key]
        self.waiting_texts -= len(chosen)
        self.waiting_tokens -= tokens
        self._virtual_time += tokens / num_requests  # what fair sharing would give to each
        items = tuple(Item(d.request.key, d.request.order[d.place], d.length) for d in chosen)
        return Batch(task, items, tokens)


def _run_around(alike: list[_Drawn], head: int, budget: int) -> slice:
    """The run of ``alike`` nearest in length to ``alike[head]`` that fits the budget with it."""
    low, high = head, head + 1
    length = alike[head].length
    left = budget - length
    while True:
        up = alike[high].length if high < len(alike) else left + 1
        down = alike[low - 1].length if low else left + 1
        if up <= left and (down > left or up - length <= length - down):
            left -= up
            high += 1
        elif down <= left:
            left -= down
            low -= 1
        else:
            return slice(low, high)
