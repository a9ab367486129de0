"""What a router counts of its requests: bound once for each pool, a few additions a chunk."""

import time
from functools import partial

from cluster.link import LinkUsage
from cluster.metrics import Counter, Registry, table

CLIENT_LEFT = 499
"""Not a status that is sent: who would get it has left."""


class PoolMeter:
    """The counters of one pool."""

    def __init__(self, registry: Registry, model: str) -> None:
        histogram, counter = registry.histogram, registry.counter
        self.arrivals = counter(table.ARRIVALS, model)
        self.counted = 0
        """Requests that ended with a count of their tokens."""
        self.request_s = histogram(table.REQUEST_SECONDS, model)
        self.queue_s = histogram(table.QUEUE_SECONDS, model)
        self.ttft_s = histogram(table.TTFT_SECONDS, model)
        self.itl_s = histogram(table.ITL_SECONDS, model)
        self.tpot_s = histogram(table.TPOT_SECONDS, model)
        self.prompt_tokens = counter(table.PROMPT_TOKENS, model)
        self.cached_tokens = counter(table.CACHED_TOKENS, model)
        self.completion_tokens = counter(table.COMPLETION_TOKENS, model)
        self.shed = counter(table.SHED, model)
        self.retries = counter(table.RETRIES, model)
        self.cut_off = counter(table.CUT_OFF, model)
        self.fallbacks = counter(table.LINK_FALLBACKS, model)
        self._requests = partial(counter, table.REQUESTS, model)

    def watch(self, route: str) -> "Watch":
        """Begin to watch one request."""
        self.arrivals.add()
        return Watch(self, route)

    def requests(self, route: str, status: int) -> Counter:
        """Requests that ended so."""
        return self._requests(route, str(status))


class Watch:
    """One request from its arrival to its end."""

    __slots__ = ("_begun", "_first", "_itl", "_last", "_meter", "_placed", "_route", "status")

    def __init__(self, meter: PoolMeter, route: str) -> None:
        self._meter = meter
        self._route = route
        self._itl = meter.itl_s
        self._begun = time.perf_counter()
        self._placed = self._first = self._last = 0.0
        self.status = CLIENT_LEFT
        """The status of its answer; until one is known, that of a client who leaves."""

    def placed(self) -> None:
        """It has a place at a replica; where that one is lost, at another."""
        self._placed = time.perf_counter()

    def chunk(self) -> None:
        """A piece of its stream goes out."""
        now = time.perf_counter()
        if self._last:
            self._itl.observe(now - self._last)
        else:
            self._first = now
        self._last = now

    def end(self, usage: LinkUsage | None) -> None:
        """It has ended, in whatever way."""
        meter = self._meter
        elapsed = time.perf_counter() - self._begun
        meter.request_s.observe(elapsed)
        meter.requests(self._route, self.status).add()
        if self._placed:
            meter.queue_s.observe(self._placed - self._begun)
        if self._first:
            meter.ttft_s.observe(self._first - self._begun)
        if usage is not None:
            meter.counted += 1
            meter.prompt_tokens.add(usage.prompt_tokens)
            meter.cached_tokens.add(usage.cached_tokens)
            meter.completion_tokens.add(usage.completion_tokens)
            if self._first and usage.completion_tokens > 1:
                generating = self._last - self._first
                meter.tpot_s.observe(generating / (usage.completion_tokens - 1))
