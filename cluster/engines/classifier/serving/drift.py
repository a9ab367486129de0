"""Drift of classified texts: comparison with a reference made with the model.

Counts labels, confidence and lengths in the bins of ``cluster.models.reference``: since the start
for metrics, and over a recent window for the comparison. Used on the event loop only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.engines.classifier.model.types import Rows
from cluster.models.reference import (
    CONFIDENCE_BINS,
    LENGTH_BINS,
    Counts,
    Reference,
    count_confidence,
    count_lengths,
    stability_index,
)

PENDING_TEXTS = 256
"""Texts counted together; counting them one by one costs 20 times as much."""
WINDOW_TEXTS = 2048
"""Least number of recent texts in the window, which holds up to twice as many."""
MIN_TEXTS = 500
"""Least number of texts to compare. With fewer, chance alone gives an index over
bins / texts = 0.04."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Population stability indices of the window; above 0.25 is commonly called a major change."""

    labels: float
    confidence: float
    length: float


@dataclass(frozen=True, slots=True)
class DriftSnapshot:
    """Counts since the start, and the window's drift."""

    num_texts: int
    labels: dict[str, int]
    """Texts by best label."""
    confidence: tuple[int, ...]
    """Texts by the best label's score, in bins of equal width from 0 to 1."""
    length: tuple[int, ...]
    """Texts by characters; bin i ends before 2^i, the last bin is open."""
    window_texts: int
    drift: Drift | None
    """None without a reference, or with too few texts in the window."""


class DriftMonitor:
    """Counts the texts of one classifier.

    Args:
        labels: Labels by column.
        reference: Statistics of the texts that the model was made with; None compares nothing.
    """

    def __init__(self, labels: Sequence[str], reference: Reference | None) -> None:
        self._labels = tuple(labels)
        self._reference = _align(reference, self._labels)
        self._pending: list[tuple[Rows, list[int]]] = []
        self.num_pending = 0
        """Texts observed and not counted yet; fewer than ``PENDING_TEXTS``."""
        self._total = self._older = self._newer = _Histograms.empty(len(self._labels))

    def observe(self, scores: Rows, lengths: list[int]) -> None:
        """Observe a request's scores, [texts, labels], and its texts' lengths in characters."""
        self._pending.append((scores, lengths))
        self.num_pending += len(lengths)
        if self.num_pending >= PENDING_TEXTS:
            self._count()

    def snapshot(self) -> DriftSnapshot:
        self._count()
        window = self._older.plus(self._newer)
        return DriftSnapshot(
            num_texts=self._total.num_texts,
            labels=dict(zip(self._labels, self._total.labels.tolist(), strict=True)),
            confidence=tuple(self._total.confidence.tolist()),
            length=tuple(self._total.length.tolist()),
            window_texts=window.num_texts,
            drift=self._compare(window),
        )

    def _count(self) -> None:
        if not self._pending:
            return
        scores = np.concatenate([rows for rows, _ in self._pending])
        lengths = np.array([length for _, lengths in self._pending for length in lengths])
        self._pending, self.num_pending = [], 0
        counted = _Histograms(
            np.bincount(scores.argmax(1), minlength=len(self._labels)),
            count_confidence(scores.max(1)),
            count_lengths(lengths),
        )
        self._total = self._total.plus(counted)
        self._newer = self._newer.plus(counted)
        if self._newer.num_texts >= WINDOW_TEXTS:
            self._older, self._newer = self._newer, _Histograms.empty(len(self._labels))

    def _compare(self, window: "_Histograms") -> Drift | None:
        if self._reference is None or window.num_texts < MIN_TEXTS:
            return None
        return Drift(*map(stability_index, self._reference, window))


class _Histograms(NamedTuple):
    labels: Counts
    confidence: Counts
    length: Counts

    @classmethod
    def empty(cls, num_labels: int) -> "_Histograms":
        sizes = num_labels, CONFIDENCE_BINS, LENGTH_BINS
        return cls(*(np.zeros(size, np.int64) for size in sizes))

    @property
    def num_texts(self) -> int:
        return int(self.length.sum())

    def plus(self, other: "_Histograms") -> "_Histograms":
        return _Histograms(*map(np.add, self, other))


def _align(reference: Reference | None, labels: Sequence[str]) -> _Histograms | None:
    """Order the reference's counts by the model's labels; labels it lacks count as 0."""
    if reference is None:
        return None
    return _Histograms(
        np.array([reference.labels.get(label, 0) for label in labels], np.int64),
        np.array(reference.confidence, np.int64),
        np.array(reference.length, np.int64),
    )
