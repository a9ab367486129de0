"""Temperature scaling: division of the logits by one number, so that confidence means accuracy.

It changes no label, since it keeps the order of the logits (Guo et al., arXiv:1706.04599). The
temperature is stored in the model's directory.
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
NUM_BINS = 15  # of the expected calibration error, as in Guo et al.
# Beyond these, the texts are unsuitable for calibration.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperature, and its effect on the texts it was fitted to."""

    temperature: float
    ece_before: float
    """Expected calibration error without the temperature."""
    ece_after: float
    """Expected calibration error with the temperature."""
    num_texts: int


def calibrate(logits: Floats, truth: NDArray[np.integer[Any]]) -> Calibration:
    """Fit the temperature to logits, [texts, labels], and true label ids, [texts].

    Raises:
        ConfigError: no temperature is optimal, e.g. because every label is correct.
    """
    temperature = fit_temperature(logits, truth)
    if not MIN_TEMPERATURE * 1.01 < temperature < MAX_TEMPERATURE / 1.01:
        raise ConfigError(
            f"cannot fit a temperature to these {len(truth)} texts: the model labels "
            f"{np.mean(logits.argmax(1) == truth):.0%} of them correctly. Use texts that were not "
            f"in its training data."
        )
    return Calibration(
        temperature=temperature,
        ece_before=expected_calibration_error(softmax(logits), truth),
        ece_after=expected_calibration_error(softmax(logits / temperature), truth),
        num_texts=len(truth),
    )


def fit_temperature(logits: Floats, truth: NDArray[np.integer[Any]]) -> float:
    # The cross-entropy is convex in 1 / temperature, so its slope changes sign once: bisect.
    chosen = logits[np.arange(len(truth)), truth]

    def slope(inverse: float) -> float:
        return float(((softmax(logits * inverse) * logits).sum(1) - chosen).mean())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def expected_calibration_error(scores: Floats, truth: NDArray[np.integer[Any]]) -> float:
    """Return the mean gap between confidence and accuracy over equal-width confidence bins."""
    confidence = scores.max(1)
    correct = scores.argmax(1) == truth
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, confidence - correct, NUM_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def softmax(logits: Floats) -> Floats:
    """Normalize logits to probabilities, [texts, labels]."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def write(directory: Path, calibration: Calibration) -> None:
    text = json.dumps(asdict(calibration), indent=2)
    (directory / FILE).write_text(f"{text}\n", encoding="utf-8")


def read_temperature(directory: Path) -> float:
    """Return the temperature of a model's directory; 1 without calibration.

    Raises:
        ConfigError: the file is damaged.
    """
    path = directory / FILE
    try:
        temperature = float(json.loads(path.read_text(encoding="utf-8"))["temperature"])
    except (FileNotFoundError, NotADirectoryError):
        return 1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot read the temperature: {error!r}") from None
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        allowed = f"{MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
        raise ConfigError(f"{path}: temperature: got {temperature}; allowed: {allowed}")
    return temperature
