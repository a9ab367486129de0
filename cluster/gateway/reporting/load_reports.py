"""Load reports for autoscaling: arrival rates and latency percentiles of each pool.

Metrics only grow, so a report is the difference between their values now and some seconds ago.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.reports import Latency, LoadReport
from cluster.autoscaling.settings import ROUTER
from cluster.config import ServedPool, TandemConfig
from cluster.gateway.pools.pool import Pool
from cluster.metrics import Histogram, quantile, table

RATE_WINDOW_S = 6.0
"""Window of arrival rates: three reports, so a late one matters little and a burst shows soon."""
LATENCY_WINDOW_S = 30.0
"""Window of latency percentiles."""
_PRIOR_REQUESTS = 20.0  # weight of the previous mean length, in requests


@dataclass(frozen=True, slots=True)
class _Counts:
    """A pool's metrics at one moment."""

    at: float
    arrivals: float
    latencies: Mapping[str, list[int]]


class _PoolReporter:
    """Reports on one pool, from a history of its metrics."""

    def __init__(self, pool: Pool, objectives: Mapping[str, tuple[float, Histogram]]) -> None:
        self._pool = pool
        self._objectives = objectives
        self._history: deque[_Counts] = deque()
        self._last_totals = (0.0, 0.0, 0.0)
        self._prefill_mean = self._decode_mean = 0.0  # tokens of a request

    def set_objectives(self, objectives: Mapping[str, tuple[float, Histogram]]) -> None:
        """Change the reported latencies; if other ones are, the history is cleared."""
        if objectives.keys() != self._objectives.keys():
            self._objectives = objectives
            self._history.clear()

    def report(self, now: float) -> LoadReport:
        pool = self._pool
        pool.meter.count_gaps()
        counts = _Counts(
            now,
            pool.meter.arrivals.value,
            {name: list(histogram.counts) for name, (_, histogram) in self._objectives.items()},
        )
        self._history.append(counts)
        while self._history[0].at < now - LATENCY_WINDOW_S:
            self._history.popleft()
        self._update_means()
        before = next(old for old in self._history if old.at >= now - RATE_WINDOW_S)
        elapsed_s = now - before.at
        rate = (counts.arrivals - before.arrivals) / elapsed_s if elapsed_s > 0 else 0.0
        loads = pool.replicas.loads
        return LoadReport(
            requests_per_s=rate,
            prefill_per_s=rate * self._prefill_mean,
            decode_per_s=rate * self._decode_mean,
            in_flight=float(pool.num_in_flight),
            queued=float(pool.num_queued),
            waiting=float(sum(load.waiting for load in loads)),
            prefill_each=self._prefill_mean,
            kv_usage=sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
            latencies={name: self._latency(name, counts) for name in self._objectives},
        )

    def _update_means(self) -> None:
        """Update the mean lengths from finished requests; the router cannot tokenize new ones."""
        meter = self._pool.meter
        prefill = meter.prompt_tokens.value - meter.cached_tokens.value
        totals = float(meter.num_with_usage), prefill, meter.completion_tokens.value
        ended, prefill, decode = (
            now - before for now, before in zip(totals, self._last_totals, strict=True)
        )
        self._last_totals = totals
        if ended > 0:
            is_first = not (self._prefill_mean or self._decode_mean)
            weight = 1.0 if is_first else ended / (ended + _PRIOR_REQUESTS)
            self._prefill_mean += weight * (prefill / ended - self._prefill_mean)
            self._decode_mean += weight * (decode / ended - self._decode_mean)

    def _latency(self, name: str, counts: _Counts) -> Latency:
        share, histogram = self._objectives[name]
        before = self._history[0].latencies[name]
        recent = [a - b for a, b in zip(counts.latencies[name], before, strict=True)]
        return Latency(quantile(histogram.bounds, recent, share) or 0.0, float(sum(recent)))


class LoadReports:
    """Reports of one router on all its pools and on itself."""

    def __init__(self, config: TandemConfig, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        self._reporters = {
            name: _PoolReporter(pools[name], _objectives(pool, pools[name]))
            for name, pool in config.served_pools
        }
        self._last: tuple[float, float] | None = None

    def reconfigure(self, config: TandemConfig) -> None:
        """Apply changed SLOs."""
        for name, pool in config.served_pools:
            self._reporters[name].set_objectives(_objectives(pool, self._pools[name]))

    def report(self, now: float, cpu_s: float) -> dict[str, float]:
        """Return the reports on all pools and the router in one flat mapping.

        Args:
            now: Monotonic time in seconds.
            cpu_s: CPU time used by this process, in seconds.
        """
        last_at, last_cpu_s = self._last or (now, cpu_s)
        self._last = now, cpu_s
        elapsed_s = now - last_at
        reports = {name: reporter.report(now) for name, reporter in self._reporters.items()}
        router = LoadReport(
            in_flight=sum(report.in_flight + report.queued for report in reports.values()),
            cores=(cpu_s - last_cpu_s) / elapsed_s if elapsed_s > 0 else 0.0,
        )
        flat = router.flatten(ROUTER)
        for name, report in reports.items():
            flat |= report.flatten(name)
        return flat


def _objectives(config: ServedPool, pool: Pool) -> dict[str, tuple[float, Histogram]]:
    return {
        name: (share, pool.meter.histogram(metric))
        for name, limit_s in config.slo
        if limit_s is not None
        for share, metric in (table.SLO_METRICS[name],)
    }
