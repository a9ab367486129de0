"""What a router counts of its requests: bound once for each pool, a time noted for each chunk."""

from dataclasses import dataclass
from functools import partial
from operator import sub
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import msgspec

from cluster.gateway.messages import Request
from cluster.gateway.recording.request_log import (
    CLIENT_LEFT,
    Outcome,
    RequestLog,
    RequestRecord,
    outcome_of,
)
from cluster.gateway.recording.usage import UsageAccount
from cluster.link import RequestHead
from cluster.metrics import Counter, Registry, table
from cluster.usage import Usage

if TYPE_CHECKING:
    from cluster.tracing.router import RequestTrace
    from cluster.tracing.tracer import Tracer

ShedReason = Literal["queue_full", "too_long", "deadline", "expired"]
FailoverReason = Literal["lost", "refused", "unavailable", "drained"]


class Ending(Protocol):
    """Who is told of a request's end."""

    def end(self, status: int, usage: Usage | None) -> None:
        """The request has ended with this status; ``usage`` is None where it is not known."""


@dataclass(frozen=True, slots=True)
class Observers:
    """What a router tells of its requests."""

    registry: Registry
    journal: RequestLog
    tracer: "Tracer | None" = None
    usage: UsageAccount | None = None


class PoolMeter:
    """The counters of one pool, and what else is told of its requests."""

    def __init__(self, model: str, observers: Observers) -> None:
        self.model = model
        self.journal = observers.journal
        self.tracer = observers.tracer
        self.usage = observers.usage
        registry = observers.registry
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
        self.cut_off = counter(table.CUT_OFF, model)
        self.fallbacks = counter(table.LINK_FALLBACKS, model)
        self.choice_s = histogram(table.ROUTING_SECONDS, model)
        self.choices = partial(counter, table.ROUTING_DECISIONS, model)
        self._registry = registry
        self._requests: dict[tuple[str, int], Counter] = {}
        self.watched: set[RequestObserver] = set()
        """Requests that have not ended."""
        registry.on_collect(self.count_gaps)
        # All there from the beginning, or a rate would not see the first of each.
        self._shed = {reason: counter(table.SHED, model, reason) for reason in get_args(ShedReason)}
        self._handovers = {
            reason: counter(table.FAILOVERS, model, reason) for reason in get_args(FailoverReason)
        }

    def watch(self, request: Request, route: str, grant: Ending | None = None) -> "RequestObserver":
        """Begin to watch one request, of whose end ``grant`` is told."""
        if grant is not None:  # else it is the router's own, which no replica has to be there for
            self.arrivals.add()
        watch = RequestObserver(self, request, route, grant)
        self.watched.add(watch)
        return watch

    def count_gaps(self) -> None:
        """Count the gaps of streams that go on; to be called before ``itl_s`` is read."""
        for watch in self.watched:
            watch.count_gaps()

    def shed(self, reason: ShedReason) -> None:
        """Count a request that is refused."""
        self._shed[reason].add()

    def failed_over(self, reason: FailoverReason) -> None:
        """Count a request that outlived its replica's part in the pool."""
        self._handovers[reason].add()

    def refuse(self, request: Request, route: str, status: int) -> None:
        """Count and log a request that was not let in."""
        self.requests(route, status).add()
        self.journal.write(
            RequestRecord(
                request.id,
                route,
                status,
                outcome_of(status),
                tenant=request.tenant,
                model=self.model,
            )
        )

    def requests(self, route: str, status: int) -> Counter:
        """Requests that ended so."""
        counter = self._requests.get((route, status))
        if counter is None:
            counter = self._registry.counter(table.REQUESTS, self.model, route, str(status))
            self._requests[route, status] = counter
        return counter


class RequestObserver:
    """One request from its arrival to its end."""

    __slots__ = (
        *("_begun", "_first", "_grant", "_meter", "_placed", "_replica"),
        *("_request", "_route", "_trace", "cut_off", "status", "writes"),
    )

    def __init__(
        self, meter: PoolMeter, request: Request, route: str, grant: Ending | None
    ) -> None:
        self._meter = meter
        self._request = request
        self._grant = grant
        self._route = route
        self._trace = None if meter.tracer is None else _trace(meter.tracer, request, route)
        self._begun = perf_counter()
        self._placed = self._first = 0.0
        self.writes: list[float] = []
        """When pieces of its stream went out, for the relay to append to: a call for each would
        take as long as counting it. Those whose gaps are counted leave, but the last."""
        self.status = CLIENT_LEFT
        """The status of its answer; until one is known, that of a client who leaves."""
        self._replica: str | None = None
        self.cut_off = False
        """Whether its answer ended before it was whole."""

    def placed(self, replica: str) -> None:
        """It has a place at a replica; where that one is lost, at another."""
        self._placed = perf_counter()
        self._replica = replica

    def asks(
        self, head: RequestHead, replica_id: str, address: tuple[str, int], way: str
    ) -> RequestHead:
        """A replica is asked, over its link or a handle; returns the head that it gets."""
        if self._trace is None:
            return head
        headers = self._trace.start_attempt(head.headers, replica_id, address, way)
        return msgspec.structs.replace(head, headers=headers)

    def count_gaps(self) -> None:
        """Count the gaps between the writes until now."""
        writes = self.writes
        if writes and not self._first:
            self._first = writes[0]
        if len(writes) > 1:
            self._meter.itl_s.observe_all(map(sub, writes[1:], writes))
            del writes[:-1]

    def end(self, usage: Usage | None) -> None:
        """It has ended, in whatever way."""
        if self._grant is not None:
            self._grant.end(self.status, usage)
        meter = self._meter
        meter.watched.discard(self)
        self.count_gaps()
        elapsed = perf_counter() - self._begun
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
                generating = self.writes[-1] - self._first
                meter.tpot_s.observe(generating / (usage.completion_tokens - 1))
            if meter.usage is not None:
                meter.usage.add(self._request.tenant, meter.model, usage)
        if self._trace is not None:
            queue_s = self._placed - self._begun if self._placed else None
            first_s = self._first - self._begun if self._first else None
            self._trace.end(self.status, queue_s, first_s, usage)
        outcome = outcome_of(self.status, cut_off=self.cut_off)
        if meter.journal.wants(outcome):
            meter.journal.write(self._ended(outcome, elapsed, usage), self._request.body)

    def _ended(self, outcome: Outcome, elapsed: float, usage: Usage | None) -> RequestRecord:
        return RequestRecord(
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


def _trace(tracer: "Tracer", request: Request, route: str) -> "RequestTrace":
    from cluster.tracing import names
    from cluster.tracing.router import RequestTrace

    attributes = {names.REQUEST_ID: request.id, names.TENANT: request.tenant}
    return RequestTrace(tracer, request.headers, request.method, route, attributes)
