"""Counters, gauges and histograms as plain numbers, updated on one event loop and read on scrape.

prometheus-client's own classes take a lock per update and search buckets linearly, which costs
several times what a router may spend on a token.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from cluster.metrics.table import Metric

MAX_SERIES = 1000
"""Label sets per metric; further ones are counted under the label value ``other``."""
OTHER = "other"


class Counter:
    """Monotonically increasing sum."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount


class Gauge:
    """Value that can go up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """Number of observations per bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Observations per bucket, not cumulative; the last bucket has no upper bound."""
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def observe_all(self, values: Iterable[float]) -> None:
        """Count many values; takes half the time of one ``observe`` per value."""
        ascending = sorted(values)
        self.total += sum(ascending)
        done = 0
        while done < len(ascending):
            bucket, end = bisect_left(self.bounds, ascending[done]), len(ascending)
            if bucket < len(self.bounds):
                end = bisect_right(ascending, self.bounds[bucket], done)
            self.counts[bucket] += end - done
            done = end

    def add(self, other: "Histogram") -> None:
        """Add the observations of ``other``, which has the same bounds."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def set(self, other: "Histogram") -> None:
        self.counts, self.total = list(other.counts), other.total


Child = Counter | Gauge | Histogram
T = TypeVar("T", Counter, Gauge, Histogram)


class Registry:
    """Children of every metric by label values, created on first use."""

    def __init__(self) -> None:
        self._children: dict[Metric, dict[tuple[str, ...], Child]] = {}
        self._collectors: list[Callable[[], None]] = []

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """Return the counter for these label values, given in the metric's order."""
        return self._child(metric, labels, Counter)

    def gauge(self, metric: Metric, *labels: str) -> Gauge:
        return self._child(metric, labels, Gauge)

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        return self._child(metric, labels, lambda: Histogram(metric.buckets))

    def on_collect(self, collector: Callable[[], None]) -> None:
        """Call ``collector`` before each ``collect``, to set values that are not kept current."""
        self._collectors.append(collector)

    def collect(self) -> Iterator[tuple[Metric, tuple[str, ...], Child]]:
        """Yield every child with its label values, grouped by metric.

        Children of a renamed metric come twice: under its name and under its deprecated name.
        """
        for collector in self._collectors:
            collector()
        for metric, children in self._children.items():
            for exported in metric, metric.deprecated_alias:
                if exported is not None:
                    yield from ((exported, labels, child) for labels, child in children.items())

    def series(self, metric: Metric) -> Mapping[tuple[str, ...], Child]:
        """Return the current children of one metric by label values."""
        return self._children.get(metric, {})

    def _child(self, metric: Metric, labels: tuple[str, ...], make: Callable[[], T]) -> T:
        children = self._children.setdefault(metric, {})
        child = children.get(labels)
        if child is None:
            if len(labels) != len(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}, got {labels}")
            if len(children) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            child = children.setdefault(labels, make())
        return child  # type: ignore[return-value]  # all children of a metric have one type
