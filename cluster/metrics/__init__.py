"""Metric definitions and the registry that holds their values.

A registry belongs to one event loop and has no locks. ``exposition`` writes it in Prometheus' text
format; ``deployments.metrics`` exports it through Ray.
"""

from cluster.metrics import table
from cluster.metrics.exposition import exposition
from cluster.metrics.quantiles import quantile
from cluster.metrics.registry import Counter, Histogram, Registry
from cluster.metrics.table import Metric

__all__ = ["Counter", "Histogram", "Metric", "Registry", "exposition", "quantile", "table"]
