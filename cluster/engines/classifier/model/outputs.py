"""Scores and embeddings from a network's outputs, as the model's own configuration defines them.

Pooling is read from the files of sentence-transformers, ``modules.json`` and
``1_Pooling/config.json``; a model without them uses the mean, at unit length.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import cached_file

from cluster.models.calibration import read_temperature

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda logits: logits,
    "Sigmoid": torch.sigmoid,
}


def to_scores(logits: Tensor, config: Any) -> Tensor:
    """Return scores according to ``problem_type``, as transformers' pipeline does.

    A cross-encoder's activation, which sentence-transformers saves in ``config``, takes precedence.
    Logits are divided by the temperature that ``apply_calibration`` put into ``config``, if any.
    """
    if config.num_labels == 1 and (activation := _saved_activation(config)):
        return _ACTIVATIONS[activation](logits)
    logits = logits * getattr(config, "inverse_temperature", 1.0)
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def apply_calibration(config: Any, directory: Path) -> None:
    """Make ``to_scores`` use the temperature saved in a model's directory, if there is one.

    Raises:
        ConfigError: The file cannot be read.
    """
    config.inverse_temperature = 1 / read_temperature(directory)


def _saved_activation(config: Any) -> str | None:
    saved = getattr(config, "sentence_transformers", None) or {}
    old = getattr(config, "sbert_ce_default_activation_function", None)
    name = str(saved.get("activation_fn") or old or "").rsplit(".", 1)[-1]
    return name if name in _ACTIVATIONS else None


@dataclass(frozen=True, slots=True)
class _Ragged:
    """Tokens of several texts, end to end; see ``Pooling.__call__``."""

    hidden: Tensor
    text_index: Tensor
    positions: Tensor
    starts: Tensor

    def sum_by_text(self, values: Tensor) -> Tensor:
        """Sum [tokens, width] over each text to [texts, width]."""
        zeros = values.new_zeros(len(self.starts) + 1, values.shape[1])
        return zeros.index_add_(0, self.text_index, values)[:-1]

    def lengths(self) -> Tensor:
        """Return the tokens of each text, [texts, 1]."""
        return self.sum_by_text(torch.ones_like(self.hidden[:, :1]))


def _max(texts: _Ragged) -> Tensor:
    hidden = texts.hidden
    least = hidden.new_full((len(texts.starts) + 1, hidden.shape[1]), -torch.inf)
    index = texts.text_index[:, None].expand_as(hidden)
    return least.scatter_reduce_(0, index, hidden, "amax")[:-1]


def _weighted_mean(texts: _Ragged) -> Tensor:
    """Weight each token by its position, counted from 1."""
    weights = (texts.positions[:, None] + 1).float()
    return texts.sum_by_text(texts.hidden * weights) / texts.sum_by_text(weights)


def _last(texts: _Ragged) -> Tensor:
    lasts = texts.starts + texts.lengths()[:, 0].long() - 1
    return texts.hidden[lasts.clamp(min=0)]  # padding rows have no tokens


# Sentence-transformers concatenates several modes in this order.
_MODES: Mapping[str, Callable[[_Ragged], Tensor]] = {
    "cls_token": lambda texts: texts.hidden[texts.starts],
    "max_tokens": _max,
    "mean_tokens": lambda texts: texts.sum_by_text(texts.hidden) / texts.lengths(),
    "mean_sqrt_len_tokens": lambda texts: texts.sum_by_text(texts.hidden) / texts.lengths().sqrt(),
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
_PREFIX = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Pooling:
    """Reduction of a text's token vectors to its embedding."""

    modes: tuple[str, ...] = ("mean_tokens",)
    """Vectors to concatenate, one per mode."""
    normalize: bool = True
    """True if the embedding has unit length."""

    def __call__(
        self, hidden: Tensor, text_index: Tensor, positions: Tensor, starts: Tensor
    ) -> Tensor:
        """Return float32 embeddings [texts, width * modes].

        Args:
            hidden: Token vectors of several texts end to end, [tokens, width].
            text_index: Text of each token; the number of texts marks padding.
            positions: Position of each token in its text.
            starts: Row of each text's first token.
        """
        texts = _Ragged(hidden.float(), text_index, positions, starts)
        vectors = torch.cat([_MODES[mode](texts) for mode in self.modes], -1)
        return normalize(vectors, dim=-1) if self.normalize else vectors


def read_pooling(path: str) -> Pooling:
    """Read the pooling of the model at ``path``, a directory or a Hugging Face id.

    Raises:
        ValueError: The model has pooling modules or modes that are not supported.
    """
    modules = _read(path, "modules.json")
    if modules is None:
        return Pooling()
    kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    if unsupported := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"unsupported pooling modules in modules.json: {', '.join(unsupported)}")
    if "Pooling" not in kinds:
        return Pooling(normalize="Normalize" in kinds)
    options = _read(path, f"{kinds['Pooling']}/config.json") or {}
    modes = [mode for mode in _MODES if options.pop(_PREFIX + mode, False)]
    if unsupported := sorted(key for key in options if key.startswith(_PREFIX) and options[key]):
        raise ValueError(f"unsupported pooling modes: {', '.join(unsupported)}")
    return Pooling(tuple(modes or Pooling().modes), "Normalize" in kinds)


def _read(path: str, name: str) -> Any:
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return json.load(file)
