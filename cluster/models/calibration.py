"""Temperature scaling: one number by which logits are divided, so that confidence means accuracy.

It changes no label, for it keeps the order of the logits (Guo et al., arXiv:1706.04599). Pure but
for ``read`` and ``write``, which own one file in a model's directory.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError

FILE = "calibration.json"
NUM_BINS = 15
"""Of the expected calibration error; the usual number since Guo et al."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Beyond them it is the texts that are wrong, not the confidence."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A temperature and what it did to the texts that it was fitted on."""

    temperature: float
    ece_before: float
    ece_after: float
    num_texts: int


def calibrate(logits: Floats, truth: NDArray[np.integer[Any]]) -> Calibration:
    """Fit the temperature to logits, [texts, labels], and the labels that are true, [texts].

    Raises:
        ConfigError: the texts have no likeliest temperature, as when every label is right.
    """
    temperature = fit_temperature(logits, truth)
    if not MIN_TEMPERATURE * 1.01 < temperature < MAX_TEMPERATURE / 1.01:
        raise ConfigError(
            f"the {len(truth)} texts tell no temperature: the model is right about "
            f"{np.mean(logits.argmax(1) == truth):.0%} of them; use texts that are new to it"
        )
    return Calibration(
        temperature=temperature,
        ece_before=expected_calibration_error(softmax(logits), truth),
        ece_after=expected_calibration_error(softmax(logits / temperature), truth),
        num_texts=len(truth),
    )


def fit_temperature(logits: Floats, truth: NDArray[np.integer[Any]]) -> float:
    """The temperature of least cross-entropy.

    The cross-entropy is convex in 1 / temperature, so its slope there has one sign change, and
    halving the interval finds it.
    """
    chosen = logits[np.arange(len(truth)), truth]

    def slope(inverse: float) -> float:
        return float(((softmax(logits * inverse) * logits).sum(1) - chosen).mean())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def expected_calibration_error(scores: Floats, truth: NDArray[np.integer[Any]]) -> float:
    """Mean distance of confidence and accuracy over equal bins of confidence, by their texts."""
    confidence = scores.max(1)
    right = scores.argmax(1) == truth
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, confidence - right, NUM_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def softmax(logits: Floats) -> Floats:
    """Scores that add up to 1 in each row."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def write(directory: Path, calibration: Calibration) -> None:
    """Leave it in a model's directory, where the engine looks for it."""
    text = json.dumps(asdict(calibration), indent=2)
    (directory / FILE).write_text(f"{text}\n", encoding="utf-8")


def read_temperature(directory: Path) -> float:
    """The temperature of a model's directory; 1 where it was never calibrated.

    Raises:
        ConfigError: the file there is not one that ``write`` wrote.
    """
    path = directory / FILE
    try:
        temperature = float(json.loads(path.read_text(encoding="utf-8"))["temperature"])
    except (FileNotFoundError, NotADirectoryError):
        return 1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no temperature can be read from it: {error!r}") from None
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        allowed = f"{MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
        raise ConfigError(f"{path}: temperature: got {temperature}; allowed: {allowed}")
    return temperature
