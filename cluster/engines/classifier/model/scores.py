"""Scores from a classifier's logits, as the model's own configuration says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.models.calibration import read_temperature

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda logits: logits,
    "Sigmoid": torch.sigmoid,
}


def to_scores(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits to scores by ``problem_type``, as the pipeline of transformers does.

    A cross-encoder's own activation comes first: sentence-transformers keeps its name there.
    ``apply_calibration`` may have given ``config`` a temperature.
    """
    if config.num_labels == 1 and (activation := _activation(config)):
        return _ACTIVATIONS[activation](logits)
    logits = logits * getattr(config, "inverse_temperature", 1.0)
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def apply_calibration(config: Any, directory: Path) -> None:
    """Have ``to_scores`` use the temperature that lies in a model's directory, if one does.

    Raises:
        ConfigError: it cannot be read.
    """
    config.inverse_temperature = 1 / read_temperature(directory)


def _activation(config: Any) -> str | None:
    """The name of the activation that a cross-encoder was saved with, if it is known here."""
    saved = getattr(config, "sentence_transformers", None) or {}
    old = getattr(config, "sbert_ce_default_activation_function", None)
    name = str(saved.get("activation_fn") or old or "").rsplit(".", 1)[-1]
    return name if name in _ACTIVATIONS else None
