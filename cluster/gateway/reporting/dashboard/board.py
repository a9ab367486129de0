"""Rates, percentiles and levels of all routers together, second by second. Pure.

A row holds the points of all charts at one second: rates and percentiles over the ``WINDOW_S``
seconds that end with it, and levels at its end. It is computed once, for all viewers.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from cluster.gateway.recording.tenant_seconds import LATENCIES, PoolSecond
from cluster.gateway.reporting.dashboard.history import HISTORY_S, MAX_CLOCK_STEP_S
from cluster.gateway.reporting.dashboard.report import Second
from cluster.metrics import quantile

WINDOW_S = 5
ALL = ""
"""Name that stands for all pools together."""
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
RATES = ("requests", "failed", "refused", "prompt_tokens", "completion_tokens")
_LEVELS = ("in_flight", "queued", "running", "waiting", "kv_cache")
LEVELS = {name: name for name in _LEVELS} | {"ongoing": "in_flight"}  # the last is deprecated
"""Fields of ``PoolSecond`` with levels, by their column."""
COLUMNS = (*RATES, *LEVELS, *(f"{name}_{share}" for name in LATENCIES for share in SHARES))
"""Columns of a row: requests and tokens per second, levels, and latencies in seconds."""

Values = list[float | None]
"""Values in the order of ``COLUMNS``; None for a latency without observations."""


@dataclass(frozen=True, slots=True)
class BoardRow:
    """One second of every pool, and of ``ALL``."""

    time: int
    pools: dict[str, Values]


class Board:
    """Rows of the last ``HISTORY_S`` seconds."""

    def __init__(self, pool_names: Iterable[str]) -> None:
        self._pool_names = tuple(pool_names)
        self._rows: deque[BoardRow] = deque(maxlen=HISTORY_S)
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S)

    @property
    def last(self) -> int:
        """Unix time of the newest row; 0 before the first."""
        return self._rows[-1].time if self._rows else 0

    def seconds_of(self, tenant: str, since: int) -> list[Second]:
        """Return the tenant's part of the merged seconds after ``since``, oldest first."""
        return [second.of_tenant(tenant) for second in self._seconds if second.time > since]

    def since(self, time: int) -> list[BoardRow]:
        """Return the rows after ``time``, oldest first."""
        return [row for row in self._rows if row.time > time]

    def restart_if_set_back(self, newest: int) -> None:
        """Drop all rows if the clock was set back; new ones would be older than them."""
        if newest < self.last - MAX_CLOCK_STEP_S:
            self._rows.clear()
            self._seconds.clear()

    def add_rows(self, reports: Iterable[Iterable[Second]], until: int) -> Iterator[None]:
        """Compute the rows up to ``until``; yield after each, so that the caller can pause.

        Args:
            reports: Seconds of each router.
            until: Unix time of the last row; later seconds are left for the next call.
        """
        merged: dict[int, Second] = {}
        for seconds in reports:
            for second in seconds:
                if self.last < second.time <= until:
                    other = merged.get(second.time)
                    merged[second.time] = second if other is None else _merge(other, second)
        for time in sorted(merged):
            self._seconds.append(merged[time])
            self._rows.append(self._row(time))
            yield

    def _row(self, time: int) -> BoardRow:
        newest_first = islice(reversed(self._seconds), WINDOW_S)
        recent = [second for second in newest_first if second.time > time - WINDOW_S]
        span_s = sum(second.span_s for second in recent) or 1.0
        levels = recent[0].pools
        pools: dict[str, Values] = {}
        sums = {
            name: _sum_rates(second.pools.get(name) for second in recent)
            for name in self._pool_names
        }
        for name, total in sums.items():
            pools[name] = _values(total, levels.get(name, PoolSecond()), span_s)
        total = _sum_rates(sums.values())
        unrouted = sum(second.unrouted for second in recent)
        total.requests += unrouted
        total.refused += unrouted
        pools[ALL] = _values(total, sum_levels(levels), span_s)
        return BoardRow(time, pools)


def _merge(first: Second, second: Second) -> Second:
    """Return one second of two routers together."""
    pools = _merge_all(first.pools, second.pools)
    tenants = dict(first.tenants)
    for name, by_pool in second.tenants.items():
        tenants[name] = _merge_all(tenants.get(name, {}), by_pool)
    span_s = max(first.span_s, second.span_s)
    return Second(first.time, span_s, pools, first.unrouted + second.unrouted, tenants)


def _merge_all(
    first: Mapping[str, PoolSecond], second: Mapping[str, PoolSecond]
) -> dict[str, PoolSecond]:
    pools = dict(first)
    for name, pool in second.items():
        other = pools.get(name)
        pools[name] = pool if other is None else _merge_pools(other, pool)
    return pools


def _merge_pools(first: PoolSecond, second: PoolSecond) -> PoolSecond:
    total = _sum_rates((first, second))
    total.in_flight = first.in_flight + second.in_flight
    total.queued = first.queued + second.queued
    # Both routers got these from the same replicas, at slightly different moments.
    total.running = max(first.running, second.running)
    total.waiting = max(first.waiting, second.waiting)
    total.kv_cache = max(first.kv_cache, second.kv_cache)
    return total


def _sum_rates(seconds: Iterable[PoolSecond | None]) -> PoolSecond:
    """Return the sums of all counts, without the levels."""
    total = PoolSecond()
    for second in seconds:
        if second is None:
            continue
        for name in RATES:
            setattr(total, name, getattr(total, name) + getattr(second, name))
        for name, counts in second.latencies.items():
            buckets = total.latencies.setdefault(name, {})
            for bucket, count in counts.items():
                buckets[bucket] = buckets.get(bucket, 0) + count
    return total


def sum_levels(levels: Mapping[str, PoolSecond]) -> PoolSecond:
    """Return the levels of all pools together; ``kv_cache`` is that of the fullest pool."""
    total = PoolSecond(kv_cache=max((pool.kv_cache for pool in levels.values()), default=0.0))
    for pool in levels.values():
        total.in_flight += pool.in_flight
        total.queued += pool.queued
        total.running += pool.running
        total.waiting += pool.waiting
    return total


def level_values(level: PoolSecond) -> dict[str, float]:
    """Return the levels by column."""
    return {column: round(getattr(level, field), 4) for column, field in LEVELS.items()}


def _values(total: PoolSecond, level: PoolSecond, span_s: float) -> Values:
    values: Values = [round(getattr(total, name) / span_s, 3) for name in RATES]
    values += level_values(level).values()
    for name, metric in LATENCIES.items():
        counts = [0] * (len(metric.buckets) + 1)
        for bucket, count in total.latencies.get(name, {}).items():
            counts[bucket] = count
        for share in SHARES.values():
            latency_s = quantile(metric.buckets, counts, share)
            values.append(None if latency_s is None else round(latency_s, 6))
    return values
