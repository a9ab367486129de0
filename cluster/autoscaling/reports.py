"""Load reports of routers: their form in Ray Serve's metrics, and their sum over all routers."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cluster.autoscaling.signals import Objective, PoolSignals

_SEPARATOR = "/"
"""Separates a pool's name, which cannot contain it, from the name of a value."""


@dataclass(frozen=True, slots=True)
class Latency:
    """A percentile and the number of observations behind it."""

    observed_s: float
    samples: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One router's report on one pool; the fields are those of ``PoolSignals``."""

    requests_per_s: float = 0.0
    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    in_flight: float = 0.0
    queued: float = 0.0
    waiting: float = 0.0
    """Requests that wait in the engines, other routers' included."""
    prefill_each: float = 0.0
    """Mean uncached prompt tokens of a request."""
    kv_usage: float = 0.0
    cores: float = 0.0
    latencies: Mapping[str, Latency] = field(default_factory=dict)

    def flatten(self, pool: str) -> dict[str, float]:
        flat = {f"{pool}/{name}": getattr(self, name) for name in _NUMBERS}
        for name, latency in self.latencies.items():
            flat[f"{pool}/{name}/observed_s"] = latency.observed_s
            flat[f"{pool}/{name}/samples"] = latency.samples
        return flat


_NUMBERS = [f.name for f in fields(LoadReport) if f.name != "latencies"]


def parse_reports(flat: Mapping[str, float]) -> dict[str, LoadReport]:
    """Return one router's reports by pool; unknown names are ignored.

    If any number is negative or not finite, the router is not trusted and there are no reports.
    """
    if not all(math.isfinite(value) and value >= 0 for value in flat.values()):
        return {}
    numbers: dict[str, dict[str, Any]] = defaultdict(dict)
    latencies: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in flat.items():
        match name.split(_SEPARATOR):
            case [pool, number] if number in _NUMBERS:
                numbers[pool][number] = value
            case [pool, objective, part] if part in ("observed_s", "samples"):
                latencies[pool][objective][part] = value
    return {
        pool: LoadReport(
            **found,
            latencies={
                objective: Latency(**parts)
                for objective, parts in latencies[pool].items()
                if len(parts) == 2
            },
        )
        for pool, found in numbers.items()
    }


def merge_reports(
    reports: Collection[LoadReport], limits: Mapping[str, float], base: PoolSignals
) -> PoolSignals:
    """Return ``base`` with one report of each router on one pool.

    ``limits`` are the objectives in seconds, by name.
    """

    def total(name: str) -> float:
        return math.fsum(getattr(report, name) for report in reports)

    def highest(name: str) -> float:
        return max((getattr(report, name) for report in reports), default=0.0)

    waiting = total("queued") + highest("waiting")
    return replace(
        base,
        requests_per_s=total("requests_per_s"),
        prefill_per_s=total("prefill_per_s"),
        decode_per_s=total("decode_per_s"),
        in_flight=total("in_flight"),
        queued=total("queued"),
        queued_tokens=waiting * highest("prefill_each"),
        kv_usage=min(1.0, highest("kv_usage")),
        cores=total("cores"),
        objectives=tuple(_merge_latency(name, limit, reports) for name, limit in limits.items()),
        core_limit=base.core_limit,
    )


def _merge_latency(name: str, limit_s: float, reports: Iterable[LoadReport]) -> Objective:
    """Return the mean of the routers' percentiles, weighted by their observations."""
    known = [found for report in reports if (found := report.latencies.get(name)) is not None]
    samples = math.fsum(latency.samples for latency in known)
    weighted = math.fsum(latency.observed_s * latency.samples for latency in known)
    return Objective(name, limit_s, weighted / samples if samples else 0.0, samples)
