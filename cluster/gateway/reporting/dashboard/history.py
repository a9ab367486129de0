"""The last minutes of one router, a second at a time. Owns a bounded ring; time is an argument."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.gateway.pools.pool import Pool
from cluster.gateway.recording.request_log import CLIENT_LEFT
from cluster.gateway.reporting.dashboard.report import (
    LATENCIES,
    Change,
    PoolNow,
    PoolSecond,
    ReplicaNow,
    Second,
)
from cluster.metrics import Counter, Registry, table

HISTORY_S = 300
MAX_CHANGES = 50
MAX_DRIFT_S = 10
"""Where the clock was set by more than this, what was kept cannot be told from what comes."""

_COUNTS = {"prompt_tokens": table.PROMPT_TOKENS, "completion_tokens": table.COMPLETION_TOKENS}


@dataclass(slots=True)
class _Totals:
    """Everything of a pool that only grows."""

    counts: dict[str, int]
    buckets: dict[str, list[int]] = field(default_factory=dict)


class History:
    """Reads the registry once a second and keeps what came since the reading before."""

    def __init__(self, registry: Registry, pools: Mapping[str, Pool]) -> None:
        self._registry = registry
        self._pools = pools
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self._changes: deque[Change] = deque(maxlen=MAX_CHANGES)
        self._replicas: dict[str, frozenset[str]] = {name: frozenset() for name in pools}
        self._read_at: float | None = None
        self._totals: dict[str, _Totals] = {}
        self._astray = 0

    @property
    def changes(self) -> list[Change]:
        """When replicas came or went, the oldest first."""
        return list(self._changes)

    def since(self, time: int) -> list[Second]:
        """The seconds that began after ``time`` (Unix time), the oldest first."""
        return [second for second in self._seconds if second.time > time]

    def take(self, now: float, monotonic: float) -> None:
        """A second has ended: keep it.

        Args:
            now: Unix time.
            monotonic: A clock that is never set, in seconds.
        """
        totals, unrouted = dict(self._read_totals()), self._read_astray()
        if self._read_at is not None:
            began = int(now) - 1
            if self._seconds and abs(began - self._seconds[-1].time) > MAX_DRIFT_S:
                self._seconds.clear()
            if self._seconds:
                began = max(began, self._seconds[-1].time + 1)
            pools = {
                name: self._second(pool, self._totals[name], totals[name])
                for name, pool in self._pools.items()
            }
            self._seconds.append(
                Second(began, monotonic - self._read_at, pools, unrouted - self._astray)
            )
        self._totals, self._astray, self._read_at = totals, unrouted, monotonic
        self._note_changes(now)

    def now(self) -> dict[str, PoolNow]:
        """The pools at this moment."""
        return {name: _now(pool) for name, pool in self._pools.items()}

    def _read_totals(self) -> Iterator[tuple[str, _Totals]]:
        endings = {name: [0, 0, 0] for name in self._pools}
        for (model, _, status), child in self._registry.series(table.REQUESTS).items():
            if model in endings and status.isdigit() and isinstance(child, Counter):
                for index, counted in enumerate(_kinds(int(status))):
                    endings[model][index] += int(child.value) * counted
        for name, (requests, failed, refused) in endings.items():
            self._pools[name].meter.count_gaps()
            cut_off = self._registry.counter(table.CUT_OFF, name)
            counts = {
                "requests": requests,
                "failed": failed + int(cut_off.value),
                "refused": refused,
            }
            for key, metric in _COUNTS.items():
                counts[key] = int(self._registry.counter(metric, name).value)
            buckets = {
                key: list(self._registry.histogram(metric, name).counts)
                for key, metric in LATENCIES.items()
            }
            yield name, _Totals(counts, buckets)

    def _read_astray(self) -> int:
        return sum(
            int(child.value)
            for (model, _, status), child in self._registry.series(table.REQUESTS).items()
            if not model and isinstance(child, Counter) and _kinds(int(status))[2]
        )

    def _second(self, pool: Pool, before: _Totals, after: _Totals) -> PoolSecond:
        second = _now(pool).level()
        for key, value in after.counts.items():
            setattr(second, key, value - before.counts[key])
        for key, counts in after.buckets.items():
            if grown := _grown(before.buckets[key], counts):
                second.latencies[key] = grown
        return second

    def _note_changes(self, now: float) -> None:
        for name, pool in self._pools.items():
            ids = frozenset(replica.info.id for replica in pool.replicas)
            before = self._replicas[name]
            if ids != before:
                added, removed = sorted(ids - before), sorted(before - ids)
                self._changes.append(Change(now, name, added, removed, len(ids)))
                self._replicas[name] = ids


def _kinds(status: int) -> tuple[bool, bool, bool]:
    """Whether a status counts as a request, a failed one, a refused one."""
    return True, status >= 500, 400 <= status < CLIENT_LEFT


def _grown(before: list[int], after: list[int]) -> dict[int, int]:
    if before == after:
        return {}
    pairs = enumerate(zip(before, after, strict=True))
    return {index: new - old for index, (old, new) in pairs if new != old}


def _now(pool: Pool) -> PoolNow:
    return PoolNow(pool.kind, _replicas(pool), pool.num_queued)


def _replicas(pool: Pool) -> list[ReplicaNow]:
    found = []
    for replica in pool.replicas:
        now = ReplicaNow(replica.info.id, replica.state, replica.in_flight)
        if (load := replica.link.load) is not None:
            now.running, now.waiting = load.running, load.waiting
            now.kv_cache = load.kv_cache_usage
        found.append(now)
    return found
