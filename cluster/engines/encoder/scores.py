"""What a model's last tensors mean: scores from logits, one vector from many tokens."""

from pathlib import Path
from typing import Any

import torch

from cluster.models.calibration import read_temperature


def to_scores(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits to scores by ``problem_type``, as the pipeline of transformers does.

    ``apply_calibration`` may have given ``config`` a temperature.
    """
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


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The unit vectors along the mean of each text's tokens: [n, length, hidden] → [n, hidden]."""
    weights = mask.unsqueeze(-1).to(torch.float32)
    mean = (hidden.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
