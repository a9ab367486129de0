"""Observation of requests: metrics, traces, request log and usage.

A ``PoolMeter`` binds the series of one pool once. A ``RequestObserver`` follows one request; on the
path of a streamed token it costs one appended timestamp.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import sub
from time import perf_counter
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from cluster.errors import OverloadedError
from cluster.gateway.messages import Request
from cluster.gateway.recording.request_log import (
    ABANDONED,
    CLIENT_DISCONNECTED,
    Outcome,
    Replay,
    RequestLog,
    RequestRecord,
    outcome_of,
)
from cluster.gateway.recording.tenant_seconds import TenantSeconds
from cluster.gateway.recording.usage import UsageAccount
from cluster.link import RequestHead
from cluster.metrics import Counter, Histogram, Registry, table
from cluster.routing import Circuit
from cluster.routing.breaker import CircuitCause
from cluster.usage import Usage

if TYPE_CHECKING:
    from cluster.tracing.router import RequestTrace
    from cluster.tracing.tracer import Tracer

ShedReason = Literal["queue_full", "too_long", "deadline", "expired", "displaced"]
FailoverReason = Literal["lost", "refused", "unavailable", "drained", "hung"]
HandoverReason = Literal["lost", "unavailable", "drained", "hung"]
HandoverOutcome = Literal["continued", "failed"]
HedgeOutcome = Literal["won", "lost"]

OnEnd = Callable[[int, Usage | None, bool], None]
"""Called at the end of a request with its status and, if known, its usage."""


@dataclass(frozen=True, slots=True)
class RequestSinks:
    """Destinations of a router's observations."""

    registry: Registry
    log: RequestLog
    tracer: "Tracer | None" = None
    usage: UsageAccount | None = None
    tenants: TenantSeconds = field(default_factory=TenantSeconds)


class PoolMeter:
    """Metrics of one pool, and the observers of its requests.

    Args:
        pool_name: Name of the pool.
        sinks: Destinations of the observations.
        model: Name under which usage is charged; the pool's, unless it is a rollout's candidate.
    """

    def __init__(self, pool_name: str, sinks: RequestSinks, model: str | None = None) -> None:
        self.pool_name = pool_name
        self.model = model or pool_name
        self.log = sinks.log
        self.tracer = sinks.tracer
        self.usage = sinks.usage
        self.tenants = sinks.tenants
        self._registry = sinks.registry
        counter, histogram = self._counter, self.histogram
        self.arrivals = counter(table.ARRIVALS)
        self.num_with_usage = 0
        """Requests that ended with a known usage."""
        self.squared_tokens = 0.0
        """Sum of the squares of their completion tokens."""
        self.num_finished = 0
        """Requests of clients that ended, except shed and abandoned ones."""
        self.num_failed = 0
        """Finished requests that ended with a server error or were cut off."""
        self.request_s = histogram(table.REQUEST_SECONDS)
        self.queue_s = histogram(table.QUEUE_SECONDS)
        self.ttft_s = histogram(table.TTFT_SECONDS)
        self.itl_s = histogram(table.ITL_SECONDS)
        self.tpot_s = histogram(table.TPOT_SECONDS)
        self.prompt_tokens = counter(table.PROMPT_TOKENS)
        self.cached_tokens = counter(table.CACHED_TOKENS)
        self.completion_tokens = counter(table.COMPLETION_TOKENS)
        self.cut_off = counter(table.CUT_OFF)
        self.fallbacks = counter(table.LINK_FALLBACKS)
        self.routing_s = histogram(table.ROUTING_SECONDS)
        self._requests: dict[tuple[str, int], Counter] = {}
        # Created now, at 0: a rate over a series that appears with its first event misses it.
        self._shed = {reason: counter(table.SHED, reason) for reason in get_args(ShedReason)}
        self._failovers = {
            reason: counter(table.FAILOVERS, reason) for reason in get_args(FailoverReason)
        }
        self._handovers = {
            (reason, outcome): counter(table.HANDOVERS, reason, outcome)
            for reason in get_args(HandoverReason)
            for outcome in get_args(HandoverOutcome)
        }
        self.handover_s = histogram(table.HANDOVER_SECONDS)
        self._replays = {replay: counter(table.REPLAYS, replay) for replay in get_args(Replay)}
        self._hedges = {
            outcome: counter(table.HEDGES, outcome) for outcome in get_args(HedgeOutcome)
        }
        self._openings = {
            cause: counter(table.CIRCUIT_OPENINGS, cause) for cause in get_args(CircuitCause)
        }
        self.num_interactive_arrivals = 0
        """Requests of clients that arrived, without lines of batches."""
        self.num_interactive = 0
        """Requests of clients that have not ended, without lines of batches."""
        self.on_interactive: Callable[[], None] | None = None
        """Called when such a request has arrived, before it is sent to a replica."""
        self.open_requests: set[RequestObserver] = set()
        """Observers of the requests that have not ended."""
        sinks.registry.on_collect(self.count_gaps)

    def histogram(self, metric: table.Metric) -> Histogram:
        """Return the pool's histogram of a metric."""
        return self._registry.histogram(metric, self.pool_name)

    def observe(
        self, request: Request, route: str, on_end: OnEnd | None = None
    ) -> "RequestObserver":
        """Return the observer of a request that has just arrived."""
        # The router's own requests have no on_end; they must not cause autoscaling.
        if on_end is not None:
            self.arrivals.add()
            if not request.is_batch_line:
                self.num_interactive_arrivals += 1
                self.num_interactive += 1
                if self.on_interactive is not None:
                    self.on_interactive()
        observer = RequestObserver(self, request, route, on_end)
        self.open_requests.add(observer)
        return observer

    def count_gaps(self) -> None:
        """Count the inter-token gaps of open streams; call this before reading ``itl_s``."""
        for observer in self.open_requests:
            observer.count_gaps()

    def decisions(self, policy: str) -> Counter:
        """Return the counter of routing decisions of one policy."""
        return self._counter(table.ROUTING_DECISIONS, policy)

    def shed(self, reason: ShedReason) -> None:
        """Count a request that is rejected for load."""
        self._shed[reason].add()

    def failed_over(self, reason: FailoverReason) -> None:
        """Count a failover, or a request that ended on a draining replica."""
        self._failovers[reason].add()

    def handed_over(self, reason: HandoverReason, outcome: HandoverOutcome) -> None:
        """Count an attempt to have another replica continue an answer."""
        self._handovers[reason, outcome].add()

    def hedged(self, outcome: HedgeOutcome) -> None:
        """Count a request that was sent to a second replica, which answered first or not."""
        self._hedges[outcome].add()

    def circuit_changed(self, circuit: Circuit) -> None:
        """Count the opening of a replica's circuit."""
        if circuit.state == "open":
            self._openings[circuit.cause].add()

    def reject(
        self, request: Request, route: str, status: int, replay: Replay | None = None
    ) -> None:
        """Count and log a request that was rejected before entering the queue."""
        self.requests(route, status).add()
        if replay is not None:
            self.replayed(replay)
        name, tenant, outcome = self.pool_name, request.tenant, outcome_of(status)
        self.tenants.count(tenant, name, status)
        guards = str(request.guard_notes or "") or None
        record = RequestRecord(
            *(request.id, route, status, outcome, tenant, name), replay=replay, guards=guards
        )
        self.log.write(record)

    def replayed(self, replay: Replay) -> None:
        """Count a request with an idempotency key that had been used before."""
        self._replays[replay].add()

    def requests(self, route: str, status: int) -> Counter:
        """Return the counter of finished requests with this route and status."""
        counter = self._requests.get((route, status))
        if counter is None:
            counter = self._counter(table.REQUESTS, route, str(status))
            self._requests[route, status] = counter
        return counter

    def _counter(self, metric: table.Metric, *labels: str) -> Counter:
        return self._registry.counter(metric, self.pool_name, *labels)


class RequestObserver:
    """One request from its arrival to its end."""

    __slots__ = (
        *("_arrived", "_first_write", "_meter", "_on_end", "_queued", "_replica", "_request"),
        "_route",
        *("_slot_taken", "_trace", "ends_later", "hedge", "is_cut_off", "is_trial"),
        *("num_handovers", "replay", "status", "write_times"),
    )

    def __init__(
        self, meter: PoolMeter, request: Request, route: str, on_end: OnEnd | None
    ) -> None:
        self._meter = meter
        self._request = request
        self._on_end = on_end
        self._route = route
        self._trace = None if meter.tracer is None else _trace(meter.tracer, request, route)
        self._queued = perf_counter()
        self._arrived = self._queued if request.arrived_s is None else request.arrived_s
        self._slot_taken = self._first_write = 0.0
        self.write_times: list[float] = []
        """Times at which pieces of the stream arrived. Its link appends to it directly, because a
        method call costs as much as the counting; ``count_gaps`` then drops all but the last."""
        self.status = CLIENT_DISCONNECTED
        """Status of the response; until that is known, the status of a disconnect."""
        self._replica: str | None = None
        self.is_cut_off = False
        """True if the response ended before it was complete."""
        self.num_handovers = 0
        """Replicas that continued the answer of another one."""
        self.replay: Replay | None = None
        """Set if an earlier request had the same idempotency key."""
        self.hedge: HedgeOutcome | None = None
        """Set if the request was sent to a second replica: ``won`` if that one answered first."""
        self.is_trial = False
        """True if the request was a trial of a replica that had been taken out."""
        self.ends_later = False
        """True if the client disconnected and the replica has yet to report the usage."""

    def new_write_times(self) -> list[float] | None:
        """Return a list for the times of a replica's answer; None if they are not wanted."""
        return []

    def slot_taken(self, replica_id: str) -> None:
        """Note that the request got a slot; after a failover, again."""
        self._slot_taken = perf_counter()
        self._replica = replica_id

    def hedged(self, outcome: HedgeOutcome, replica_id: str) -> None:
        """Note which of two replicas answered first."""
        self.hedge, self._replica = outcome, replica_id

    def trace_attempt(
        self, head: RequestHead, replica_id: str, address: tuple[str, int], state: str
    ) -> RequestHead:
        """Begin the span of an attempt at a replica; return the head with its trace context."""
        if self._trace is None:
            return head
        headers = self._trace.start_attempt(head.headers, replica_id, address, state)
        return msgspec.structs.replace(head, headers=headers)

    def count_gaps(self) -> None:
        """Count the gaps between the writes until now."""
        times = self.write_times
        if times and not self._first_write:
            self._first_write = times[0]
        if len(times) > 1:
            self._meter.itl_s.observe_all(map(sub, times[1:], times))
            del times[:-1]

    def end(self, usage: Usage | None) -> None:
        """Record the end of the request; call this exactly once."""
        if self._on_end is not None:
            self._on_end(self.status, usage, bool(self._slot_taken))
        notes = self._request.guard_notes
        if notes is not None and notes.status is not None and self.status == CLIENT_DISCONNECTED:
            self.status = notes.status  # it was not the client that cancelled the request
        meter = self._meter
        if self._on_end is not None and not self._request.is_batch_line:
            meter.num_interactive -= 1
        meter.open_requests.discard(self)
        self.count_gaps()
        total_s = perf_counter() - self._arrived
        meter.request_s.observe(total_s)
        meter.requests(self._route, self.status).add()
        if self.replay is not None:
            meter.replayed(self.replay)
        queue_s = self._slot_taken - self._queued if self._slot_taken else None
        ttft_s = self._ttft_s(usage)
        if queue_s is not None:
            meter.queue_s.observe(queue_s)
        if ttft_s is not None:
            meter.ttft_s.observe(ttft_s)
        if usage is not None:
            self._count_usage(usage)
        self._count_outcome()
        if not self._request.is_copy:
            meter.tenants.count(
                self._request.tenant,
                meter.pool_name,
                self.status,
                is_cut_off=self.is_cut_off,
                usage=usage,
                latencies_s={"total": total_s, "queue": queue_s, "ttft": ttft_s},
            )
        if self._trace is not None:
            self._trace.end(self.status, queue_s, ttft_s, usage)
        outcome = outcome_of(self.status, cut_off=self.is_cut_off)
        if meter.log.wants(outcome):
            record = self._record(outcome, usage, queue_s, ttft_s, total_s)
            # A check's body has the text that a guard may have redacted from the request.
            meter.log.write(record, b"" if self._request.is_copy else self._request.body)

    def _count_outcome(self) -> None:
        if self._on_end is None or self.status in (*ABANDONED, OverloadedError.status):
            return
        self._meter.num_finished += 1
        self._meter.num_failed += self.status >= 500 or self.is_cut_off

    def _ttft_s(self, usage: Usage | None) -> float | None:
        if self._first_write:
            return self._first_write - self._arrived
        if usage is None or usage.ttft_s is None or not self._slot_taken:
            return None
        return self._slot_taken - self._arrived + usage.ttft_s  # not streamed

    def _count_usage(self, usage: Usage) -> None:
        meter = self._meter
        meter.num_with_usage += 1
        meter.prompt_tokens.add(usage.prompt_tokens)
        meter.cached_tokens.add(usage.cached_tokens)
        meter.completion_tokens.add(usage.completion_tokens)
        meter.squared_tokens += usage.completion_tokens**2
        if self._first_write and usage.completion_tokens > 1:
            decode_s = self.write_times[-1] - self._first_write
            meter.tpot_s.observe(decode_s / (usage.completion_tokens - 1))
        elif not self._first_write and usage.itl_s is not None:
            meter.itl_s.observe(usage.itl_s, usage.completion_tokens - 1)
            meter.tpot_s.observe(usage.itl_s)
        if meter.usage is not None and not self._request.is_copy:
            meter.usage.add(self._request.tenant, meter.model, usage)

    def _record(
        self,
        outcome: Outcome,
        usage: Usage | None,
        queue_s: float | None,
        ttft_s: float | None,
        total_s: float,
    ) -> RequestRecord:
        return RequestRecord(
            id=self._request.id,
            tenant=self._request.tenant,
            model=self._meter.pool_name,
            route=self._route,
            status=self.status,
            outcome=outcome,
            replica=self._replica,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            queue_s=None if queue_s is None else round(queue_s, 6),
            ttft_s=None if ttft_s is None else round(ttft_s, 6),
            total_s=round(total_s, 6),
            handovers=self.num_handovers or None,
            replay=self.replay,
            hedge=self.hedge,
            trial=self.is_trial or None,
            guards=str(self._request.guard_notes or "") or None,
        )


def _trace(tracer: "Tracer", request: Request, route: str) -> "RequestTrace":
    from cluster.tracing import names
    from cluster.tracing.router import RequestTrace

    attributes = {names.REQUEST_ID: request.id, names.TENANT: request.tenant}
    return RequestTrace(tracer, request.headers, request.method, route, attributes)
