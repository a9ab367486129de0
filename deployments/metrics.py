"""Export of a registry to Ray's metric agents, and so to Ray's dashboard and Prometheus.

Counters and histograms are exported as gauges with Prometheus' series names (``_total``;
``_bucket``, ``_sum``, ``_count``). Ray's own counter has no series before its first event, so an
alert would miss that event; its histogram takes one call per observation, here one per token.
"""

import asyncio
import logging
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from ray.serve import metrics as ray_metrics

from cluster.metrics import Histogram, Metric, Registry

logger = logging.getLogger("ray.serve.tandem")

EXPORT_S = 5.0
"""Seconds between exports; Prometheus scrapes Ray's agents less often."""


class RayExporter:
    """Exports a registry periodically, on the event loop that updates it."""

    def __init__(self, registry: Registry) -> None:
        self._metrics = RayMetrics(registry)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Export the last values and stop."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._export()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EXPORT_S)
            self._export()

    def _export(self) -> None:
        try:
            self._metrics.export()
        except Exception:  # a failing metric must not end the export or the shutdown
            logger.exception("could not export metrics to Ray")


class RayMetrics:
    """A registry's metrics as gauges of Ray."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._metrics: dict[str, Any] = {}

    def export(self) -> None:
        for metric, values, child in self.registry.collect():
            labels = dict(zip(metric.labels, values, strict=True))
            if isinstance(child, Histogram):
                self._export_histogram(metric, labels, child)
            else:
                self._gauge(metric.name, metric).set(child.value, tags=labels)

    def _export_histogram(
        self, metric: Metric, labels: Mapping[str, str], child: Histogram
    ) -> None:
        bucket = self._gauge(f"{metric.name}_bucket", metric, "le")
        bounds = [*map(str, child.bounds), "+Inf"]
        cumulative = list(accumulate(child.counts))
        for bound, count in zip(bounds, cumulative, strict=True):
            bucket.set(float(count), tags={**labels, "le": bound})
        self._gauge(f"{metric.name}_count", metric).set(float(cumulative[-1]), tags=labels)
        self._gauge(f"{metric.name}_sum", metric).set(child.total, tags=labels)

    def _gauge(self, name: str, metric: Metric, *more_labels: str) -> Any:
        gauge = self._metrics.get(name)
        if gauge is None:
            gauge = ray_metrics.Gauge(name, metric.help, (*metric.labels, *more_labels))
            self._metrics[name] = gauge
        return gauge
