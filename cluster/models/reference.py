"""Reference for drift detection: statistics of a model's texts at the time it was made.

It has three histograms: predicted labels, confidence, and text length. All models have the same
bins, so histograms of different times and replicas can be added. The reference is stored in the
model's directory.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cluster.errors import ConfigError

FILE = "reference.json"
CONFIDENCE_BINS = 20  # of equal width
LENGTH_BINS = 18  # bin 0: empty; bin i: 2^(i-1) to 2^i - 1 characters; last bin: all longer
MIN_TEXTS = 100  # chance alone gives a stability index of about bins / texts
SMOOTHING_TEXTS = 0.5  # added to each bin, so that logarithms are finite (Krichevsky-Trofimov)

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reference:
    """Text counts by label, confidence and length."""

    labels: dict[str, int]
    """Texts by predicted label; empty for a regression."""
    confidence: list[int]
    """Texts by the score of the predicted label; empty for a regression."""
    length: list[int]
    """Texts by length in characters."""

    @classmethod
    def from_scores(
        cls, scores: NDArray[np.floating], lengths: Sequence[int], names: Sequence[str]
    ) -> "Reference":
        """Count texts with these scores, [texts, labels], and lengths in characters."""
        found = np.bincount(scores.argmax(1), minlength=len(names))
        return cls(
            labels=dict(zip(names, found.tolist(), strict=True)),
            confidence=count_confidence(scores.max(1)).tolist(),
            length=count_lengths(np.asarray(lengths)).tolist(),
        )

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(f"{json.dumps(asdict(self))}\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Reference | None":
        """Read the reference of a model's directory; return None if it has none.

        Raises:
            ConfigError: the file is damaged, or was written by another version.
        """
        path = directory / FILE
        try:
            found = TypeAdapter(cls).validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a valid reference: {error}") from None
        if len(found.confidence) not in (0, CONFIDENCE_BINS) or len(found.length) != LENGTH_BINS:
            raise ConfigError(
                f"{path}: written with other bins; run `tandem models reference` again"
            )
        return found


def count_confidence(confidence: NDArray[np.floating]) -> Counts:
    bins = np.clip((confidence * CONFIDENCE_BINS).astype(np.int64), 0, CONFIDENCE_BINS - 1)
    return np.bincount(bins, minlength=CONFIDENCE_BINS)


def count_lengths(lengths: NDArray[np.integer]) -> Counts:
    """Count texts by length in characters, [LENGTH_BINS]."""
    _, exponents = np.frexp(lengths.astype(np.float64))  # n = m * 2^e with m in [1/2, 1)
    return np.bincount(np.minimum(exponents, LENGTH_BINS - 1), minlength=LENGTH_BINS)


def stability_index(reference: Sequence[int] | Counts, current: Sequence[int] | Counts) -> float:
    """Return the population stability index of two histograms with the same bins.

    It is the sum over bins of (p - q) ln(p / q). By convention, values below 0.1 mean no change and
    above 0.25 a major shift.
    """
    p, q = _shares(reference), _shares(current)
    return float(((p - q) * np.log(p / q)).sum())


def _shares(counts: Sequence[int] | Counts) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, np.float64) + SMOOTHING_TEXTS
    return np.asarray(smoothed / smoothed.sum())
