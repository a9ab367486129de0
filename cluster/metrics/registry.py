"""Counts, kept where they are made: plain numbers on one event loop, read when somebody asks.

prometheus-client's own classes lock on each count and search their buckets one by one, several
times what a router may spend on a token.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from cluster.metrics.table import Metric

MAX_SERIES = 1000
"""Label sets of one metric; what is beyond them is counted under ``other``."""
OTHER = "other"


class Counter:
    """A sum that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Add what happened since the last call."""
        self.value += amount


class Gauge:
    """A value that comes and goes."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """How often values fell between bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Observations for each bucket alone, not cumulated; the last is above all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Iterable[float]) -> None:
        """Count many values, bucket by bucket: half the time of one call for each."""
        ascending = sorted(values)
        self.total += sum(ascending)
        done = 0
        while done < len(ascending):
            bucket = bisect_left(self.bounds, ascending[done])
            end = len(ascending)
            if bucket < len(self.bounds):
                end = bisect_right(ascending, self.bounds[bucket], done)
            self.counts[bucket] += end - done
            done = end

    def add(self, other: "Histogram") -> None:
        """Count what ``other`` did, too; its bounds are the same."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def set(self, other: "Histogram") -> None:
        """Take over what ``other`` counted since the beginning."""
        self.counts, self.total = list(other.counts), other.total


Child = Counter | Gauge | Histogram
T = TypeVar("T", Counter, Gauge, Histogram)


class Registry:
    """The children of every metric, made when they are first asked for."""

    def __init__(self) -> None:
        self._children: dict[Metric, dict[tuple[str, ...], Child]] = {}
        self._collectors: list[Callable[[], None]] = []

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """The counter for these label values, in the metric's order."""
        return self._child(metric, labels, Counter)

    def gauge(self, metric: Metric, *labels: str) -> Gauge:
        """The gauge for these label values."""
        return self._child(metric, labels, Gauge)

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """The histogram for these label values."""
        return self._child(metric, labels, lambda: Histogram(metric.buckets))

    def on_collect(self, collector: Callable[[], None]) -> None:
        """Have ``collector`` called before each reading, to set what is not counted as it goes."""
        self._collectors.append(collector)

    def collect(self) -> Iterator[tuple[Metric, tuple[str, ...], Child]]:
        """Every child with its label values, grouped by metric."""
        for collector in self._collectors:
            collector()
        for metric, children in self._children.items():
            for labels, child in children.items():
                yield metric, labels, child

    def series(self, metric: Metric) -> Mapping[tuple[str, ...], Child]:
        """The children of one metric by their label values, as they are now."""
        return self._children.get(metric, {})

    def _child(self, metric: Metric, labels: tuple[str, ...], make: Callable[[], T]) -> T:
        children = self._children.setdefault(metric, {})
        child = children.get(labels)
        if child is None:
            if len(labels) != len(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}, not {labels}")
            if len(children) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            child = children.setdefault(labels, make())
        return child  # type: ignore[return-value]  # one metric has children of one kind
