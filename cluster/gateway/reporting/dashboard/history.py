"""The last minutes of one router, second by second."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.gateway.pools.pool import Pool
from cluster.gateway.recording.tenant_seconds import (
    LATENCIES,
    PoolSecond,
    TenantSeconds,
    is_refused,
)
from cluster.gateway.reporting.dashboard.report import (
    PoolNow,
    ReplicaChange,
    ReplicaNow,
    Second,
)
from cluster.metrics import Counter, Registry, table

HISTORY_S = 300
MAX_CHANGES = 50
MAX_CLOCK_STEP_S = 10
"""A larger step of the wall clock clears the history, whose times would overlap the new ones."""

_TOKEN_COUNTERS = {
    "prompt_tokens": table.PROMPT_TOKENS,
    "completion_tokens": table.COMPLETION_TOKENS,
}


@dataclass(slots=True)
class _Totals:
    """Counters of a pool, which only grow."""

    counts: dict[str, int]
    buckets: dict[str, list[int]] = field(default_factory=dict)


class History:
    """Ring of seconds; each is the difference between two readings of the registry."""

    def __init__(
        self, registry: Registry, pools: Mapping[str, Pool], tenants: TenantSeconds
    ) -> None:
        self._registry = registry
        self._pools = pools
        self._tenants = tenants
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self._changes: deque[ReplicaChange] = deque(maxlen=MAX_CHANGES)
        self._replica_ids: dict[str, frozenset[str]] = {name: frozenset() for name in pools}
        self._read_at: float | None = None
        self._totals: dict[str, _Totals] = {}
        self._unrouted = 0

    @property
    def changes(self) -> list[ReplicaChange]:
        """Changes of the running replicas, oldest first."""
        return list(self._changes)

    def since(self, time: int) -> list[Second]:
        """Return the seconds that began after ``time`` (Unix time), oldest first."""
        return [second for second in self._seconds if second.time > time]

    def sample(self, now: float, monotonic: float) -> None:
        """Record the second that has just ended.

        Args:
            now: Unix time.
            monotonic: Monotonic time in seconds.
        """
        totals, unrouted = dict(self._read_totals()), self._read_unrouted()
        span_s = 0.0 if self._read_at is None else monotonic - self._read_at
        tenants = self._tenants.take(span_s)
        if self._read_at is not None:
            began = int(now) - 1
            if self._seconds and abs(began - self._seconds[-1].time) > MAX_CLOCK_STEP_S:
                self._seconds.clear()
            if self._seconds:
                began = max(began, self._seconds[-1].time + 1)
            pools = {
                name: self._second(pool, self._totals[name], totals[name])
                for name, pool in self._pools.items()
            }
            self._seconds.append(Second(began, span_s, pools, unrouted - self._unrouted, tenants))
        self._totals, self._unrouted, self._read_at = totals, unrouted, monotonic
        self._record_changes(now)

    def now(self) -> dict[str, PoolNow]:
        """Return the current state of the pools."""
        return {name: _pool_now(pool) for name, pool in self._pools.items()}

    def _read_totals(self) -> Iterator[tuple[str, _Totals]]:
        ended = {name: [0, 0, 0] for name in self._pools}
        for (model, _, status), child in self._registry.series(table.REQUESTS).items():
            if model in ended and status.isdigit() and isinstance(child, Counter):
                for index, counted in enumerate(_classify(int(status))):
                    ended[model][index] += int(child.value) * counted
        for name, (requests, failed, refused) in ended.items():
            self._pools[name].meter.count_gaps()
            cut_off = self._registry.counter(table.CUT_OFF, name)
            counts = {
                "requests": requests,
                "failed": failed + int(cut_off.value),
                "refused": refused,
            }
            for key, metric in _TOKEN_COUNTERS.items():
                counts[key] = int(self._registry.counter(metric, name).value)
            buckets = {
                key: list(self._registry.histogram(metric, name).counts)
                for key, metric in LATENCIES.items()
            }
            yield name, _Totals(counts, buckets)

    def _read_unrouted(self) -> int:
        return sum(
            int(child.value)
            for (model, _, status), child in self._registry.series(table.REQUESTS).items()
            if not model and isinstance(child, Counter) and is_refused(int(status))
        )

    def _second(self, pool: Pool, before: _Totals, after: _Totals) -> PoolSecond:
        second = _pool_now(pool).level()
        for key, value in after.counts.items():
            setattr(second, key, value - before.counts[key])
        for key, counts in after.buckets.items():
            if grown := _growth(before.buckets[key], counts):
                second.latencies[key] = grown
        return second

    def _record_changes(self, now: float) -> None:
        for name, pool in self._pools.items():
            ids = frozenset(replica.info.id for replica in pool.replicas.running)
            before = self._replica_ids[name]
            if ids != before:
                added, removed = sorted(ids - before), sorted(before - ids)
                self._changes.append(ReplicaChange(now, name, added, removed, len(ids)))
                self._replica_ids[name] = ids


def _classify(status: int) -> tuple[bool, bool, bool]:
    """Return whether a status counts as a request, as failed, and as refused."""
    return True, status >= 500, is_refused(status)


def _growth(before: list[int], after: list[int]) -> dict[int, int]:
    if before == after:
        return {}
    pairs = enumerate(zip(before, after, strict=True))
    return {index: new - old for index, (old, new) in pairs if new != old}


def _pool_now(pool: Pool) -> PoolNow:
    replicas = []
    for replica in pool.replicas.running:
        now = ReplicaNow(replica.info.id, replica.state, replica.in_flight)
        if (load := replica.link.load) is not None:
            now.running, now.waiting = load.running, load.waiting
            now.kv_cache = load.kv_cache_usage
        now.circuit = pool.replicas.circuit(replica).state
        now.is_draining = replica.is_draining
        replicas.append(now)
    return PoolNow(pool.kind, replicas, pool.num_queued)
