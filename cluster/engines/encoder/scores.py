"""What a model's last tensors mean: scores from logits, one vector from many tokens."""

from typing import Any

import torch


def to_scores(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits to scores by ``problem_type``, as the pipeline of transformers does."""
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The unit vectors along the mean of each text's tokens: [n, length, hidden] → [n, hidden]."""
    weights = mask.unsqueeze(-1).to(torch.float32)
    mean = (hidden.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
