"""Prometheus text format of a registry, written by prometheus-client."""

from collections.abc import Callable, Iterable
from itertools import accumulate, groupby

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cluster.metrics.registry import Histogram, Registry

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES: dict[str, Callable[..., Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def exposition(registry: Registry, tenant: str | None = None) -> bytes:
    """Return the current values of the registry in Prometheus' text format.

    Args:
        registry: The registry to read.
        tenant: Return the series of this tenant only; None for all series.
    """
    collected = CollectorRegistry()
    collected.register(_Families(registry, tenant))
    return generate_latest(collected)


class _Families(Collector):
    def __init__(self, registry: Registry, tenant: str | None) -> None:
        self._registry = registry
        self._tenant = tenant

    def collect(self) -> Iterable[Family]:
        for metric, children in groupby(self._registry.collect(), key=lambda entry: entry[0]):
            has_tenant = "tenant" in metric.labels
            if self._tenant is not None and not has_tenant:
                continue
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for _, labels, child in children:
                if has_tenant and self._tenant not in (None, labels[metric.labels.index("tenant")]):
                    continue
                if isinstance(family, HistogramMetricFamily):
                    assert isinstance(child, Histogram)
                    family.add_metric(labels, _cumulative_buckets(child), child.total)
                else:
                    assert not isinstance(child, Histogram)
                    family.add_metric(labels, child.value)
            yield family


def _cumulative_buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
