"""Rates and percentiles of all routers together, second by second. Pure; owns a bounded ring.

A row holds what a chart draws at one second: rates and percentiles over the ``WINDOW_S`` that end
with it, levels as they were. It is made once, whoever looks.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cluster.gateway.reporting.dashboard.history import HISTORY_S, MAX_DRIFT_S
from cluster.gateway.reporting.dashboard.report import LATENCIES, PoolSecond, Second
from cluster.metrics import quantile

WINDOW_S = 5
ALL = ""
"""Stands for all pools together."""
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
RATES = ("requests", "failed", "refused", "prompt_tokens", "completion_tokens")
LEVELS = ("ongoing", "queued", "running", "waiting", "kv_cache")
COLUMNS = (*RATES, *LEVELS, *(f"{name}_{share}" for name in LATENCIES for share in SHARES))
"""What a row holds of each pool: requests and tokens a second, levels, and seconds."""

Values = list[float | None]
"""By ``COLUMNS``; None where nothing was observed."""


@dataclass(frozen=True, slots=True)
class BoardRow:
    """One second of every pool, and of ``ALL``."""

    time: int
    pools: dict[str, Values]


class Board:
    """The rows of the last minutes."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = tuple(models)
        self._rows: deque[BoardRow] = deque(maxlen=HISTORY_S)
        self._window: deque[Second] = deque(maxlen=WINDOW_S)

    @property
    def last(self) -> int:
        """Of the newest row, its time (Unix); 0 before there is one."""
        return self._rows[-1].time if self._rows else 0

    def since(self, time: int) -> list[BoardRow]:
        """The rows after ``time``, the oldest first."""
        return [row for row in self._rows if row.time > time]

    def restart_if_set_back(self, newest: int) -> None:
        """Forget the rows where the clock was set back: those to come would be older."""
        if newest < self.last - MAX_DRIFT_S:
            self._rows.clear()
            self._window.clear()

    def add(self, reports: Iterable[Iterable[Second]], until: int) -> Iterator[None]:
        """Make the rows of the seconds up to ``until``; stops after each, to be gone on with.

        Args:
            reports: The seconds of each router.
            until: The last second (Unix time) that is made into a row; what a router tells of it
                later is left out.
        """
        merged: dict[int, Second] = {}
        for seconds in reports:
            for second in seconds:
                if self.last < second.time <= until:
                    known = merged.get(second.time)
                    merged[second.time] = second if known is None else _together(known, second)
        for time in sorted(merged):
            self._window.append(merged[time])
            self._rows.append(self._row(time))
            yield

    def _row(self, time: int) -> BoardRow:
        recent = [second for second in self._window if second.time > time - WINDOW_S]
        span_s = sum(second.span_s for second in recent) or 1.0
        levels = recent[-1].pools
        pools: dict[str, Values] = {}
        sums = {name: _sum_of(second.pools.get(name) for second in recent) for name in self._models}
        for name, total in sums.items():
            pools[name] = _values(total, levels.get(name, PoolSecond()), span_s)
        everything = _sum_of(sums.values())
        unrouted = sum(second.unrouted for second in recent)
        everything.requests += unrouted
        everything.refused += unrouted
        pools[ALL] = _values(everything, level_of_all(levels), span_s)
        return BoardRow(time, pools)


def _together(first: Second, second: Second) -> Second:
    """One second of two routers."""
    pools = dict(first.pools)
    for name, pool in second.pools.items():
        known = pools.get(name)
        pools[name] = pool if known is None else _both(known, pool)
    span_s = max(first.span_s, second.span_s)
    return Second(first.time, span_s, pools, first.unrouted + second.unrouted)


def _both(one: PoolSecond, other: PoolSecond) -> PoolSecond:
    total = _sum_of((one, other))
    total.ongoing, total.queued = one.ongoing + other.ongoing, one.queued + other.queued
    # Both routers were told the same by the replicas, at slightly different moments.
    total.running, total.waiting = max(one.running, other.running), max(one.waiting, other.waiting)
    total.kv_cache = max(one.kv_cache, other.kv_cache)
    return total


def _sum_of(seconds: Iterable[PoolSecond | None]) -> PoolSecond:
    """What grew in all of ``seconds``; without the levels."""
    total = PoolSecond()
    for second in seconds:
        if second is None:
            continue
        for name in RATES:
            setattr(total, name, getattr(total, name) + getattr(second, name))
        for name, counts in second.latencies.items():
            kept = total.latencies.setdefault(name, {})
            for bucket, count in counts.items():
                kept[bucket] = kept.get(bucket, 0) + count
    return total


def level_of_all(levels: Mapping[str, PoolSecond]) -> PoolSecond:
    """The levels of all pools together; of KV caches, the fullest pool's."""
    everything = PoolSecond(kv_cache=max((pool.kv_cache for pool in levels.values()), default=0.0))
    for pool in levels.values():
        everything.ongoing += pool.ongoing
        everything.queued += pool.queued
        everything.running += pool.running
        everything.waiting += pool.waiting
    return everything


def _values(total: PoolSecond, level: PoolSecond, span_s: float) -> Values:
    values: Values = [round(getattr(total, name) / span_s, 3) for name in RATES]
    values += [round(getattr(level, name), 4) for name in LEVELS]
    for name, metric in LATENCIES.items():
        counts = [0] * (len(metric.buckets) + 1)
        for bucket, count in total.latencies.get(name, {}).items():
            counts[bucket] = count
        for share in SHARES.values():
            found = quantile(metric.buckets, counts, share)
            values.append(None if found is None else round(found, 6))
    return values
