"""What a router counts of its requests: bound once for each pool, a few additions a chunk."""

import time
from functools import partial

from cluster.gateway.journal import CLIENT_LEFT, Ended, Journal, Outcome, outcome_of
from cluster.gateway.messages import Request
from cluster.link import LinkUsage
from cluster.metrics import Counter, Registry, table


class PoolMeter:
    """The counters of one pool, and the journal that its requests are told to."""

    def __init__(self, registry: Registry, model: str, journal: Journal) -> None:
        self.model = model
        self.journal = journal
        histogram, counter = registry.histogram, registry.counter
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

    def watch(self, request: Request, route: str) -> "Watch":
        """Begin to watch one request."""
        return Watch(self, request, route)

    def requests(self, route: str, status: int) -> Counter:
        """Requests that ended so."""
        return self._requests(route, str(status))


class Watch:
    """One request from its arrival to its end."""

    __slots__ = (
        *("_begun", "_first", "_itl", "_last", "_meter", "_placed", "_replica", "_request"),
        *("_route", "cut_off", "status"),
    )

    def __init__(self, meter: PoolMeter, request: Request, route: str) -> None:
        self._meter = meter
        self._request = request
        self._route = route
        self._itl = meter.itl_s
        self._begun = time.perf_counter()
        self._placed = self._first = self._last = 0.0
        self.status = CLIENT_LEFT
        """The status of its answer; until one is known, that of a client who leaves."""
        self._replica: str | None = None
        self.cut_off = False
        """Whether its answer ended before it was whole."""

    def placed(self, replica: str) -> None:
        """It has a place at a replica; where that one is lost, at another."""
        self._placed = time.perf_counter()
        self._replica = replica

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
            meter.prompt_tokens.add(usage.prompt_tokens)
            meter.cached_tokens.add(usage.cached_tokens)
            meter.completion_tokens.add(usage.completion_tokens)
            if self._first and usage.completion_tokens > 1:
                generating = self._last - self._first
                meter.tpot_s.observe(generating / (usage.completion_tokens - 1))
        outcome = outcome_of(self.status, cut_off=self.cut_off)
        if meter.journal.wants(outcome):
            meter.journal.write(self._ended(outcome, elapsed, usage), self._request.body)

    def _ended(self, outcome: Outcome, elapsed: float, usage: LinkUsage | None) -> Ended:
        return Ended(
            id=self._request.id,
            tenant=self._request.tenant,
            model=self._meter.model,
            route=self._route,
            status=self.status,
            outcome=outcome,
            replica=self._replica,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            queue_s=round(self._placed - self._begun, 6) if self._placed else None,
            ttft_s=round(self._first - self._begun, 6) if self._first else None,
            total_s=round(elapsed, 6),
        )
