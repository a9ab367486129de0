"""How much work a pool's replicas can hold now, and how fast they work it off. Pure.

The limit is learned, not configured. It falls when half of the engines or more keep a standing
queue of their own or have nearly full KV caches. It rises while it binds and neither is so, unless
a token takes so much longer than it did lately that more requests would bring nothing. Until it
first falls, the number of requests is bounded instead, and doubles as fast as engines take them.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, pairwise
from statistics import median_low
from typing import NamedTuple

from cluster.load import Load

ADJUST_S = 0.5
"""The limit is looked at so often; it falls by a queue that stood for half of this time."""
SAMPLE_S = 0.01
"""Reports are looked at so often at most; hundreds of replicas report more often."""
START_HELD = 32
"""Requests for each replica that a new pool is tried with."""
DOUBLE_S = 0.1
"""Their number is doubled so often at most."""
MIN_WAITING = 4.0
"""Requests that may always wait in the engines, so that none ever lacks one."""
KV_HIGH = 0.95
"""Above this use of the KV cache an engine soon preempts what it runs."""
MAX_SLOWDOWN = 20.0
"""Of an engine whose latency is a + b * load, this is where it does 95 % of what it ever will."""
_GROW = 1.1
_MEMORY = 0.99  # each finished request weighs so much of the next one
_ROUNDING_S = 1e-6  # of sums of seconds
_SHARE_WEIGHT = 0.2  # of one report; the share that runs changes with each step of an engine
_BEST_S = 60.0  # the best latency is that of the last minute or two: other requests, another best


class _Sample(NamedTuple):
    """What all replicas had at one moment, and what this router had there."""

    at_s: float
    running: int
    waiting: int
    kv_usage: float
    held: int
    held_tokens: float


class PoolCapacity:
    """What one router may have at one pool's replicas.

    Args:
        waiting_ratio: Requests that may wait in the engines for each that runs.
    """

    def __init__(self, waiting_ratio: float) -> None:
        self.limit_tokens = float("inf")
        self.held_tokens = 0.0
        """Estimated work of the requests at the replicas."""
        self.held = 0
        self._waiting_ratio = waiting_ratio
        self._most_held = float("inf")
        self._reported = False
        self._doubled_at_s = 0.0
        self._sampled_at_s = float("-inf")
        self._samples: list[_Sample] = []  # the first is of when the limit was looked at
        self._running_share = 1.0  # of the requests that the engines have
        self._seconds = self._work = 0.0  # of finished requests, the newest weighing most
        self._running_s = 0.0  # the part of these seconds in which engines ran them
        self._num = 0.0
        self._best = self._best_before = float("inf")  # least seconds for a token
        self._best_since_s = 0.0

    def has_room(self, work_tokens: float) -> bool:
        """Whether one more such request may go to a replica."""
        return self.held == 0 or (
            self.held < self._most_held and self.held_tokens + work_tokens <= self.limit_tokens
        )

    def begin(self, work_tokens: float) -> None:
        """A request goes to a replica."""
        self.held += 1
        self.held_tokens += work_tokens

    def end(self, work_tokens: float, done_tokens: float, seconds: float) -> None:
        """It has left; ``work_tokens`` as in ``begin``, ``done_tokens`` 0 where it failed."""
        self.held -= 1
        self.held_tokens = self.held_tokens - work_tokens if self.held else 0.0
        if done_tokens > 0 and seconds > 0:
            self._seconds = self._seconds * _MEMORY + seconds
            self._running_s = self._running_s * _MEMORY + seconds * self._running_share
            self._work = self._work * _MEMORY + done_tokens
            self._num = self._num * _MEMORY + 1

    def drain_rate(self) -> float | None:
        """Tokens a second that leave, by Little's law: those that run over the time that each runs.

        Who waits inside an engine has no part in it: their number changes at once, and the time
        that they take only when they end. None until a request has ended, or while none is at a
        replica.
        """
        if not self.held or not self._running_s:
            return None
        return self.held * self._running_share * self._work / self._running_s

    def average_s(self, work_tokens: float) -> float:
        """How long a request takes at a replica by its work or on average, whichever is less; 0
        while that is not known."""
        if not self._num:
            return 0.0
        return min(self._seconds / self._num, work_tokens * self._seconds / self._work)

    def best_s(self, work_tokens: float) -> float:
        """The same at the best pace lately: for who would find the replicas idle.

        An estimate that were too high would refuse everybody, and nothing would ever correct it.
        """
        best = min(self._best, self._best_before)
        return min(self.average_s(work_tokens), work_tokens * best) if self._num else 0.0

    def observe(self, loads: Iterable[Load], now_s: float) -> None:
        """Take in the newest reports of all replicas."""
        if 0 <= now_s - self._sampled_at_s < SAMPLE_S:
            return
        self._sampled_at_s = now_s
        reports = list(loads)
        if not reports:
            return
        num = len(reports)
        # What half of the replicas have: one that lags or lies does not hold up the others.
        running = num * median_low(load.running for load in reports)
        waiting = num * median_low(load.waiting for load in reports)
        usage = median_low(load.kv_cache_usage for load in reports)
        if self.limit_tokens == float("inf"):
            self._start(num, running, waiting, now_s)
        sample = _Sample(now_s, running, waiting, usage, self.held, self.held_tokens)
        if not self._samples or now_s < self._samples[-1].at_s:  # the clock jumped back
            self._samples = [sample]
        self._samples.append(sample)
        if running:
            share = running / (running + waiting)
            self._running_share += _SHARE_WEIGHT * (share - self._running_share)
        if now_s - self._samples[0].at_s < ADJUST_S:
            return
        self._adjust(self._usual(), slow=self._slowdown(now_s) > MAX_SLOWDOWN)
        self._samples = [sample]

    def _start(self, num: int, running: int, waiting: int, now_s: float) -> None:
        if not self._reported:
            self._reported, self._most_held = True, 0.0
        if abs(now_s - self._doubled_at_s) >= DOUBLE_S and self.held >= self._most_held:
            if waiting <= self._allowed(running):
                self._most_held *= 2
            self._doubled_at_s = now_s
        self._most_held = max(self._most_held, START_HELD * num)

    def _allowed(self, running: int) -> float:
        """Requests that may wait in the engines."""
        return max(MIN_WAITING, self._waiting_ratio * running)

    def _usual(self) -> _Sample:
        """The sample with the longest queue that stood for half of the time; the lower median.

        One sample as a whole: parts of several, of a load that begins or ends, make a queue of
        none.
        """
        spans = [(one, after.at_s - one.at_s) for one, after in pairwise(self._samples)]
        spans.sort(key=lambda span: span[0].waiting - self._allowed(span[0].running))
        until_s = list(accumulate(span_s for _, span_s in spans))
        return spans[bisect_left(until_s, until_s[-1] / 2 - _ROUNDING_S)][0]

    def _adjust(self, usual: _Sample, *, slow: bool) -> None:
        allowed = self._allowed(usual.running)
        one_tokens = usual.held_tokens / max(1, usual.held)
        binds = usual.held_tokens + one_tokens > self.limit_tokens
        if usual.waiting > allowed:
            part = (usual.running + allowed) / (usual.running + usual.waiting)
            self._cut(max(one_tokens, part * usual.held_tokens))
        elif usual.kv_usage > KV_HIGH:
            self._cut(max(one_tokens, KV_HIGH / usual.kv_usage * usual.held_tokens))
        elif binds and not slow and usual.waiting <= allowed / 2:
            self.limit_tokens = self.limit_tokens * _GROW + one_tokens

    def _cut(self, tokens: float) -> None:
        self._most_held = float("inf")
        self.limit_tokens = min(self.limit_tokens, tokens)

    def _slowdown(self, now_s: float) -> float:
        """How much longer a token takes than at best; 1 while that is not known."""
        if not self._work:
            return 1.0
        if not 0 <= now_s - self._best_since_s < _BEST_S:
            self._best_before, self._best = self._best, float("inf")
            self._best_since_s = now_s
        latency = self._seconds / self._work
        self._best = min(self._best, latency)
        return latency / min(self._best, self._best_before)
