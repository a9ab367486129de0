"""What Tandem counts: one table of metrics, and the registry that counts them.

Pure and lock-free: a registry belongs to one event loop. ``exposition`` writes a registry for
Prometheus; ``deployments.metrics`` gives it to Ray.
"""

from cluster.metrics import table
from cluster.metrics.exposition import exposition
from cluster.metrics.quantiles import quantile
from cluster.metrics.registry import Counter, Gauge, Histogram, Registry
from cluster.metrics.table import Metric

__all__ = [
    "Counter",
    "Gauge",
    "Histogram",
    "Metric",
    "Registry",
    "exposition",
    "quantile",
    "table",
]
