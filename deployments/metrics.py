"""Gives what a replica counts to Ray's agents, and with that to Ray's dashboard and Prometheus.

Counters and histograms become gauges with the names of Prometheus' series (``_total``; ``_bucket``,
``_sum``, ``_count``). Ray's own counter has no series before its first event, so an alert could not
see that one happen; its histogram takes one call for each observation, and there is one for each
token.
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
"""Ray's agents are scraped less often than this."""


class RayExporter:
    """Hands a registry's values to Ray every few seconds, from the loop that counts."""

    def __init__(self, registry: Registry) -> None:
        self._metrics = RayMetrics(registry)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Hand over the last values and end."""
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
        except Exception:  # a metric less must cost neither the others nor an orderly end
            logger.exception("metrics could not be given to Ray")


class RayMetrics:
    """Hands a registry's values to Ray when told to."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._metrics: dict[str, Any] = {}

    def export(self) -> None:
        """Hand over what there is now."""
        for metric, values, child in self._registry.collect():
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
        cumulated = list(accumulate(child.counts))
        for bound, count in zip(bounds, cumulated, strict=True):
            bucket.set(float(count), tags={**labels, "le": bound})
        self._gauge(f"{metric.name}_count", metric).set(float(cumulated[-1]), tags=labels)
        self._gauge(f"{metric.name}_sum", metric).set(child.total, tags=labels)

    def _gauge(self, name: str, metric: Metric, *more_labels: str) -> Any:
        gauge = self._metrics.get(name)
        if gauge is None:
            gauge = ray_metrics.Gauge(name, metric.help, (*metric.labels, *more_labels))
            self._metrics[name] = gauge
        return gauge
