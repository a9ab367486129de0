"""What a router tells autoscaling of each pool: rates of arrival and percentiles, of the last time.

Owns short histories of the meters' counts; a report is the difference between now and a while ago.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.reports import Latency, LoadReport
from cluster.autoscaling.settings import ROUTER
from cluster.config import ClassifierConfig, GeneratorConfig, TandemConfig
from cluster.gateway.pools.pool import Pool
from cluster.metrics import Histogram, quantile

RATE_WINDOW_S = 6.0
"""Three reports: one late request does not matter much, and a burst is seen at once."""
LATENCY_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True)
class _Counts:
    """A meter at one moment."""

    at: float
    arrivals: float
    latencies: Mapping[str, list[int]]


class _PoolReports:
    """One pool's history."""

    def __init__(self, pool: Pool, objectives: Mapping[str, tuple[float, Histogram]]) -> None:
        self._pool = pool
        self._objectives = objectives
        self._history: deque[_Counts] = deque()
        self._ended = (0.0, 0.0, 0.0)
        self._prefill_each = self._decode_each = 0.0

    def report(self, now: float) -> LoadReport:
        self._pool.meter.count_gaps()
        counts = _Counts(
            now,
            self._pool.meter.arrivals.value,
            {name: list(histogram.counts) for name, (_, histogram) in self._objectives.items()},
        )
        self._history.append(counts)
        while self._history[0].at < now - LATENCY_WINDOW_S:
            self._history.popleft()
        self._follow_lengths()
        before = next(old for old in self._history if old.at >= now - RATE_WINDOW_S)
        elapsed = now - before.at
        rate = (counts.arrivals - before.arrivals) / elapsed if elapsed > 0 else 0.0
        loads = self._pool.loads
        return LoadReport(
            requests_per_s=rate,
            prefill_per_s=rate * self._prefill_each,
            decode_per_s=rate * self._decode_each,
            ongoing=float(self._pool.num_in_flight),
            queued=float(self._pool.num_queued),
            waiting=float(sum(load.waiting for load in loads)),
            prefill_each=self._prefill_each,
            kv_usage=sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
            latencies={name: self._latency(name, counts) for name in self._objectives},
        )

    def _follow_lengths(self) -> None:
        """Tokens of a request, of those that ended lately: a router reads no prompts."""
        meter = self._pool.meter
        prefill = meter.prompt_tokens.value - meter.cached_tokens.value
        now = float(meter.counted), prefill, meter.completion_tokens.value
        ended, prompts, completions = (a - b for a, b in zip(now, self._ended, strict=True))
        self._ended = now
        if ended > 0:
            # A few requests say little where many were seen before.
            weight = ended / (ended + 20.0) if self._prefill_each or self._decode_each else 1.0
            self._prefill_each += weight * (prompts / ended - self._prefill_each)
            self._decode_each += weight * (completions / ended - self._decode_each)

    def _latency(self, name: str, counts: _Counts) -> Latency:
        share, histogram = self._objectives[name]
        before = self._history[0].latencies[name]
        lately = [a - b for a, b in zip(counts.latencies[name], before, strict=True)]
        return Latency(quantile(histogram.bounds, lately, share) or 0.0, float(sum(lately)))


class LoadReports:
    """The reports of one router on all its pools and on itself."""

    def __init__(self, config: TandemConfig, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        parts: list[GeneratorConfig | ClassifierConfig] = [*config.generators, *config.classifiers]
        self._reports = {
            part.name: _PoolReports(pools[part.name], _objectives(part, pools[part.name]))
            for part in parts
        }
        self._last: tuple[float, float] | None = None

    def report(self, now: float, cpu_s: float) -> dict[str, float]:
        """All pools in one flat mapping; ``cpu_s``: CPU time that this process used so far."""
        last_at, last_cpu_s = self._last or (now, cpu_s)
        self._last = now, cpu_s
        elapsed = now - last_at
        reports = {name: pool.report(now) for name, pool in self._reports.items()}
        own = LoadReport(
            ongoing=sum(report.ongoing + report.queued for report in reports.values()),
            cores=(cpu_s - last_cpu_s) / elapsed if elapsed > 0 else 0.0,
        )
        flat = own.flat(ROUTER)
        for name, report in reports.items():
            flat |= report.flat(name)
        return flat


def _objectives(
    config: GeneratorConfig | ClassifierConfig, pool: Pool
) -> dict[str, tuple[float, Histogram]]:
    meter = pool.meter
    known = {
        "ttft_p90_s": (0.9, meter.ttft_s),
        "itl_p90_s": (0.9, meter.itl_s),
        "latency_p95_s": (0.95, meter.request_s),
    }
    return {name: known[name] for name, limit in config.slo if limit is not None}
