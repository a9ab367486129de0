"""Work that a router may have at a pool's replicas, and the speed at which they finish it. Pure.

The limit is learned, not configured:

- It falls if at least half of the engines have a standing queue or nearly full KV caches. While
  engines with free slots begin the requests of their queue, it may be longer: they compute the
  prompts of a burst.
- It rises while it binds and neither is the case, unless tokens have become so slow that more
  requests would not raise the throughput.
- Before it first falls, the number of requests is bounded instead. That bound doubles as fast as
  the engines take the requests.
- Without load for a minute, it is forgotten, because the cause may be gone, such as requests that
  were abandoned and still ran.

Speed is learned from finished requests only, not from failed or abandoned ones. Its outliers are
clipped and it is forgotten within minutes, so that one bad hour does not reject the next one.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import exp
from statistics import median_low
from typing import NamedTuple

from cluster.load import Load

ADJUST_S = 0.5
"""Interval of adjusting the limit, which falls if a queue stood for half of it."""
SAMPLE_S = 0.01
"""Minimum interval between two samples; hundreds of replicas report more often."""
START_REQUESTS = 32
"""Requests per replica with which a new pool is tried."""
DOUBLE_S = 0.1
"""Minimum interval between two doublings of that number."""
BEGIN_S = 5.0
"""Time after an increase of the running requests for which engines count as beginning others.
Longer than most steps: 2,048 prompt tokens of a small model took 1.2 s on two cores."""
MIN_WAITING = 4.0
"""Requests that may always wait in the engines, so that no engine runs dry."""
KV_HIGH = 0.95
"""KV cache usage (0 to 1) above which an engine is about to preempt running requests."""
MAX_SLOWDOWN = 20.0
"""Latency per token, relative to the best, above which the limit does not rise. An engine with the
latency a + b * load does 95 % of its maximum throughput at this point."""
_GROWTH = 1.1
_SLOW_DECAY = 0.99  # share of the sums over finished requests that is kept at each request
_FAST_DECAY = 0.85  # the same for the sums that follow a change within a few requests
_FORGET_S = 60.0  # time constant of forgetting finished requests and, without load, the limit
_MIN_EVIDENCE = 0.01  # finished requests, decayed, below which nothing is known
_MAX_OUTLIER = 8.0  # longest time of a request that is learned, relative to the estimate
_SATURATED_S = 5.0  # longer than the limit needs to fall and to rise again
_ROUNDING_S = 1e-6  # rounding error of sums of seconds
_SHARE_WEIGHT = 0.2  # weight of one report; the running share changes with each engine step
_BEST_S = 60.0  # the best latency is that of the last one to two minutes, as workloads change


class _Sample(NamedTuple):
    """Load of all replicas at one moment, and this router's part of it."""

    at_s: float
    running: int
    waiting: int
    kv_cache_usage: float
    in_flight: int
    in_flight_tokens: float
    slots: int
    """0 if unknown."""


class _Finished:
    """Decaying sums over finished requests."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.num = self.seconds = self.running_s = self.work_tokens = self.done_tokens = 0.0

    def add(
        self, work_tokens: float, done_tokens: float, seconds: float, running_share: float
    ) -> None:
        if self.num >= 1:  # clip outliers, such as a request that was stuck
            by_work_s = done_tokens * self.seconds / self.done_tokens
            seconds = min(seconds, _MAX_OUTLIER * max(by_work_s, self.seconds / self.num))
        self.scale(self._decay)
        self.num += 1
        self.seconds += seconds
        self.running_s += seconds * running_share
        self.work_tokens += work_tokens
        self.done_tokens += done_tokens

    def scale(self, share: float) -> None:
        self.num *= share
        self.seconds *= share
        self.running_s *= share
        self.work_tokens *= share
        self.done_tokens *= share
        if self.num < _MIN_EVIDENCE:
            self.num = self.seconds = self.running_s = self.work_tokens = self.done_tokens = 0.0

    def request_s(self, work_tokens: float) -> float:
        """Return the mean time, or the time in proportion to the work if that is less."""
        if not self.num:
            return 0.0
        by_work_s = work_tokens * self.seconds / self.work_tokens
        return min(self.seconds / self.num, by_work_s)


class PoolCapacity:
    """Work that one router may have at one pool's replicas.

    Args:
        waiting_ratio: Requests that may wait in the engines, per running request; per slot while
            the engines begin them.
    """

    def __init__(self, waiting_ratio: float) -> None:
        self.limit_tokens = float("inf")
        """Learned limit of ``in_flight_tokens``."""
        self.in_flight = 0
        """This router's requests at the replicas."""
        self.in_flight_tokens = 0.0
        """Estimated work of these requests."""
        self._waiting_ratio = waiting_ratio
        self._max_in_flight = float("inf")  # bounds a new pool until ``limit_tokens`` falls
        self._has_report = False
        self._doubled_s = 0.0
        self._sampled_s = float("-inf")
        self._samples: list[_Sample] = []  # since the last adjustment, whose sample is the first
        self._most_running = 0  # since the engines had no queue
        self._began_s = float("-inf")  # time at which that number rose
        self._running_share = 1.0  # of the requests that are in the engines
        self._saturated_s = float("-inf")
        self._slow = _Finished(_SLOW_DECAY)
        self._fast = _Finished(_FAST_DECAY)
        # Lowest latency (s per token) in the current and in the previous period of ``_BEST_S``.
        self._best_token_s = self._previous_best_token_s = float("inf")
        self._best_since_s = 0.0

    @property
    def has_room(self) -> bool:
        """True if another request may go to a replica, provided that one has a free slot.

        A request of any size may: the last one overdraws the limit. If a large one had to wait for
        all of its work to fit, the queue behind it would wait next to free slots.
        """
        return self.in_flight == 0 or (
            self.in_flight < self._max_in_flight and self.in_flight_tokens < self.limit_tokens
        )

    def add_request(self, work_tokens: float) -> None:
        """Count a request that goes to a replica."""
        self.in_flight += 1
        self.in_flight_tokens += work_tokens

    def remove_request(self, work_tokens: float, done_tokens: float, seconds: float) -> None:
        """Remove a request that ended.

        Args:
            work_tokens: Its estimated work, as in ``add_request``.
            done_tokens: The work that was done; 0 if it failed.
            seconds: Time that it spent at the replica.
        """
        self.in_flight -= 1
        self.in_flight_tokens = self.in_flight_tokens - work_tokens if self.in_flight else 0.0
        if done_tokens > 0 and seconds > 0:
            for finished in (self._slow, self._fast):
                finished.add(work_tokens, done_tokens, seconds, self._running_share)

    def is_saturated(self, now_s: float) -> bool:
        """Return True if the engines, not only the limit, keep further requests waiting.

        While they do not, the limit still rises, so the speed of today's requests in flight says
        little about the wait.
        """
        return 0 <= now_s - self._saturated_s <= _SATURATED_S

    def drain_tokens_per_s(self, *, hopeful: bool = False) -> float | None:
        """Return the estimated work that the replicas finish each second, for this router.

        By Little's law: running requests * (work per request) / (running time per request).
        The work is that of ``add_request``, so that errors of the estimate cancel out in the wait
        of a queue. Requests that wait inside an engine are left out, because their number changes
        at once and their waiting time is only known when they end. None before a request has
        ended, or while none is in flight.

        Args:
            hopeful: Use the last few requests instead, if they were faster.
        """
        if not self.in_flight or not self._slow.running_s:
            return None
        num_running = self.in_flight * self._running_share
        return num_running * max(
            one.work_tokens / one.running_s
            for one in ((self._slow, self._fast) if hopeful else (self._slow,))
            if one.running_s
        )

    def average_request_s(self, work_tokens: float, *, hopeful: bool = False) -> float:
        """Return the expected time of a request at a replica; 0 before one has ended.

        The mean, or the time in proportion to its work if that is less.

        Args:
            work_tokens: Its estimated work.
            hopeful: Use the last few requests instead, if they were faster.
        """
        slow_s = self._slow.request_s(work_tokens)
        return min(slow_s, self._fast.request_s(work_tokens)) if hopeful else slow_s

    def best_request_s(self, work_tokens: float) -> float:
        """Return the time of a request at the best recent latency, for idle replicas."""
        best_token_s = min(self._best_token_s, self._previous_best_token_s)
        return min(self.average_request_s(work_tokens), work_tokens * best_token_s)

    def observe_loads(self, loads: Iterable[Load], now_s: float) -> None:
        """Evaluate the newest load reports of all replicas and adjust the limit."""
        elapsed_s = now_s - self._sampled_s
        if 0 <= elapsed_s < SAMPLE_S:
            return
        self._sampled_s = now_s
        self._forget(elapsed_s)
        reports = list(loads)
        if not reports:
            return
        # Medians, so that one replica that lags or lies does not hold up the others.
        num = len(reports)
        running = num * median_low(load.running for load in reports)
        waiting = num * median_low(load.waiting for load in reports)
        kv_cache_usage = median_low(load.kv_cache_usage for load in reports)
        if self.limit_tokens == float("inf"):
            self._raise_initial_bound(num, running, waiting, now_s)
        slots = num * median_low(load.slots for load in reports)
        sample = _Sample(
            *(now_s, running, waiting, kv_cache_usage),
            *(self.in_flight, self.in_flight_tokens, slots),
        )
        self._note_running(sample)
        if not self._samples or now_s < self._samples[-1].at_s:  # the clock jumped back
            self._samples = [sample]
        self._samples.append(sample)
        if running:
            share = running / (running + waiting)
            self._running_share += _SHARE_WEIGHT * (share - self._running_share)
        if now_s - self._samples[0].at_s < ADJUST_S:
            return
        standing, is_slow = self._standing_queue(), self._slowdown(now_s) > MAX_SLOWDOWN
        if standing.waiting or standing.kv_cache_usage > KV_HIGH or is_slow:
            self._saturated_s = now_s
        is_beginning = 0 <= now_s - self._began_s < BEGIN_S and standing.running < standing.slots
        self._adjust(standing, is_slow=is_slow, is_beginning=is_beginning)
        self._samples = [sample]

    def _note_running(self, sample: _Sample) -> None:
        if sample.waiting <= self._allowed_waiting(sample.running):
            self._most_running = 0
        elif sample.running > self._most_running or not self._most_running:
            self._most_running, self._began_s = max(1, sample.running), sample.at_s

    def _forget(self, elapsed_s: float) -> None:
        """Forget finished requests with time, and the limit after a pause without reports."""
        if not 0 <= elapsed_s < float("inf"):  # the first report, or the clock jumped back
            return
        for finished in (self._slow, self._fast):
            finished.scale(exp(-elapsed_s / _FORGET_S))
        if elapsed_s > _FORGET_S:
            self.limit_tokens = self._max_in_flight = float("inf")
            self._has_report, self._samples = False, []

    def _raise_initial_bound(self, num: int, running: int, waiting: int, now_s: float) -> None:
        if not self._has_report:
            self._has_report, self._max_in_flight = True, 0.0
        if abs(now_s - self._doubled_s) >= DOUBLE_S and self.in_flight >= self._max_in_flight:
            if waiting <= self._allowed_waiting(running):
                self._max_in_flight *= 2
            self._doubled_s = now_s
        self._max_in_flight = max(self._max_in_flight, START_REQUESTS * num)

    def _allowed_waiting(self, running: int) -> float:
        """Return the number of requests that may wait in engines that run so many."""
        return max(MIN_WAITING, self._waiting_ratio * running)

    def _standing_queue(self) -> _Sample:
        """Return the sample whose excess of waiting requests was reached for half of the time.

        This is the lower median of the samples by their excess, weighted by time. It is one whole
        sample: mixing parts of several, while load begins or ends, would make up a queue.
        """
        spans = [(one, after.at_s - one.at_s) for one, after in pairwise(self._samples)]
        spans.sort(key=lambda span: span[0].waiting - self._allowed_waiting(span[0].running))
        sums_s = list(accumulate(span_s for _, span_s in spans))
        return spans[bisect_left(sums_s, sums_s[-1] / 2 - _ROUNDING_S)][0]

    def _adjust(self, standing: _Sample, *, is_slow: bool, is_beginning: bool) -> None:
        allowed = self._allowed_waiting(standing.running)
        request_tokens = standing.in_flight_tokens / max(1, standing.in_flight)
        binds = standing.in_flight_tokens + request_tokens > self.limit_tokens
        if standing.waiting > (self._allowed_waiting(standing.slots) if is_beginning else allowed):
            share = (standing.running + allowed) / (standing.running + standing.waiting)
            self._lower_limit(max(request_tokens, share * standing.in_flight_tokens))
        elif standing.kv_cache_usage > KV_HIGH:
            share = KV_HIGH / standing.kv_cache_usage
            self._lower_limit(max(request_tokens, share * standing.in_flight_tokens))
        elif binds and not is_slow and standing.waiting <= allowed / 2:
            self.limit_tokens = self.limit_tokens * _GROWTH + request_tokens

    def _lower_limit(self, tokens: float) -> None:
        self._max_in_flight = float("inf")
        self.limit_tokens = min(self.limit_tokens, tokens)

    def _slowdown(self, now_s: float) -> float:
        """Return the latency per token relative to the best; 1 before a request has ended."""
        if not self._slow.done_tokens:
            return 1.0
        if not 0 <= now_s - self._best_since_s < _BEST_S:
            self._previous_best_token_s, self._best_token_s = self._best_token_s, float("inf")
            self._best_since_s = now_s
        token_s = self._slow.seconds / self._slow.done_tokens
        self._best_token_s = min(self._best_token_s, token_s)
        return token_s / min(self._best_token_s, self._previous_best_token_s)
