"""What a model's texts looked like when it was made: the reference that drift is measured against.

Three bounded histograms: the labels found, how sure they were, how long the texts are. The bins are
the same for every model, so that histograms of different times and replicas can be added. Pure but
for ``read`` and ``write``, which own one file in a model's directory.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError

FILE = "reference.json"
CONFIDENCE_BINS = 20
"""Equal parts of 0 to 1."""
LENGTH_BINS = 18
"""Bin i holds the lengths from 2^(i-1) up to 2^i - 1 characters; the first 0, the last the rest."""
MIN_TEXTS = 100
"""Fewer say little: by chance alone, their index against any others is about bins / texts."""
HALF_TEXT = 0.5
"""Added to every bin, so that an empty one has a logarithm (the Krichevsky-Trofimov estimate)."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reference:
    """Counts of the texts by label, confidence and length."""

    labels: dict[str, int]
    """How many texts have each label; empty for a regression."""
    confidence: list[int]
    """By the score of the strongest label; empty for a regression."""
    length: list[int]
    """By characters."""

    @classmethod
    def of(
        cls, scores: NDArray[np.floating], lengths: Sequence[int], names: Sequence[str]
    ) -> "Reference":
        """The counts of texts with these scores, [texts, labels], and lengths in characters."""
        found = np.bincount(scores.argmax(1), minlength=len(names))
        return cls(
            labels=dict(zip(names, found.tolist(), strict=True)),
            confidence=count_confidence(scores.max(1)).tolist(),
            length=count_lengths(np.asarray(lengths)).tolist(),
        )

    def write(self, directory: Path) -> None:
        """Leave it in a model's directory, where the engine looks for it."""
        (directory / FILE).write_text(f"{json.dumps(asdict(self))}\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Reference | None":
        """That of a model's directory; None where there is none.

        Raises:
            ConfigError: the file there is not one that ``write`` wrote.
        """
        path = directory / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            labels = {str(name): int(count) for name, count in raw["labels"].items()}
            confidence = [int(count) for count in raw["confidence"]]
            length = [int(count) for count in raw["length"]]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: no reference can be read from it: {error!r}") from None
        if len(confidence) not in (0, CONFIDENCE_BINS) or len(length) != LENGTH_BINS:
            raise ConfigError(f"{path}: it has other bins; `tandem models reference` makes it anew")
        return cls(labels, confidence, length)


def count_confidence(confidence: NDArray[np.floating]) -> Counts:
    """Texts by confidence, [CONFIDENCE_BINS]."""
    bins = np.clip((confidence * CONFIDENCE_BINS).astype(np.int64), 0, CONFIDENCE_BINS - 1)
    return np.bincount(bins, minlength=CONFIDENCE_BINS)


def count_lengths(lengths: NDArray[np.integer]) -> Counts:
    """Texts by length in characters, [LENGTH_BINS]."""
    _, exponents = np.frexp(lengths.astype(np.float64))  # n = m * 2^e with m in [1/2, 1)
    return np.bincount(np.minimum(exponents, LENGTH_BINS - 1), minlength=LENGTH_BINS)


def stability_index(reference: Sequence[int] | Counts, current: Sequence[int] | Counts) -> float:
    """The population stability index of two histograms with the same bins.

    The sum over the bins of (p - q) ln(p / q), in nats: 0 when they are alike, by custom below 0.1
    when nothing changed and above 0.25 when much did.
    """
    p, q = _shares(reference), _shares(current)
    return float(((p - q) * np.log(p / q)).sum())


def _shares(counts: Sequence[int] | Counts) -> NDArray[np.float64]:
    smoothed = np.asarray(counts, np.float64) + HALF_TEXT
    return np.asarray(smoothed / smoothed.sum())
