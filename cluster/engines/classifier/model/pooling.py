"""One vector of many tokens: pooling as the model's own directory says it.

sentence-transformers keeps it in ``modules.json`` and ``1_Pooling/config.json``; a model without
these is pooled by the mean, at unit length.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import cached_file


@dataclass(frozen=True, slots=True)
class _Ragged:
    """The tokens of some texts, end to end; see ``Pooling.__call__``."""

    hidden: Tensor
    owners: Tensor
    positions: Tensor
    firsts: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Over each text, of [tokens, width]."""
        zeros = values.new_zeros(len(self.firsts) + 1, values.shape[1])
        return zeros.index_add_(0, self.owners, values)[:-1]

    def lengths(self) -> Tensor:
        """[texts, 1]"""
        return self.sums(torch.ones_like(self.hidden[:, :1]))


def _mean(texts: _Ragged) -> Tensor:
    return texts.sums(texts.hidden) / texts.lengths()


def _mean_sqrt(texts: _Ragged) -> Tensor:
    return texts.sums(texts.hidden) / texts.lengths().sqrt()


def _max(texts: _Ragged) -> Tensor:
    hidden = texts.hidden
    least = hidden.new_full((len(texts.firsts) + 1, hidden.shape[1]), -torch.inf)
    owners = texts.owners[:, None].expand_as(hidden)
    return least.scatter_reduce_(0, owners, hidden, "amax")[:-1]


def _weighted_mean(texts: _Ragged) -> Tensor:
    """The later a token stands, the more it weighs."""
    weights = (texts.positions[:, None] + 1).float()
    return texts.sums(texts.hidden * weights) / texts.sums(weights)


def _last(texts: _Ragged) -> Tensor:
    lasts = texts.firsts + texts.lengths()[:, 0].long() - 1
    return texts.hidden[lasts.clamp(min=0)]  # a row without a text has none


# In the order in which sentence-transformers puts several side by side.
_MODES: Mapping[str, Callable[[_Ragged], Tensor]] = {
    "cls_token": lambda texts: texts.hidden[texts.firsts],
    "max_tokens": _max,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean_tokens": _weighted_mean,
    "lasttoken": _last,
}
_PREFIX = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the tokens of a text become its vector."""

    modes: tuple[str, ...] = ("mean_tokens",)
    """Each gives a vector; they stand side by side."""
    normalize: bool = True
    """Whether the vector has unit length."""

    def __call__(self, hidden: Tensor, owners: Tensor, positions: Tensor, firsts: Tensor) -> Tensor:
        """[tokens, width] of some texts end to end → float32 [texts, width * modes].

        Args:
            hidden: What the tokens have become.
            owners: Which text each token is of; that after the last one is nobody's.
            positions: Where in its text each token stands.
            firsts: The row of each text's first token.
        """
        texts = _Ragged(hidden.float(), owners, positions, firsts)
        vectors = torch.cat([_MODES[mode](texts) for mode in self.modes], -1)
        return normalize(vectors, dim=-1) if self.normalize else vectors


def read_pooling(path: str) -> Pooling:
    """The pooling of the model at ``path``, a directory or a Hugging Face id.

    Raises:
        ValueError: it has modules that are not known here.
    """
    modules = _read(path, "modules.json")
    if modules is None:
        return Pooling()
    kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"modules.json has {', '.join(unknown)}, which embeddings here have not")
    if "Pooling" not in kinds:
        return Pooling(normalize="Normalize" in kinds)
    said = _read(path, f"{kinds['Pooling']}/config.json") or {}
    modes = [mode for mode in _MODES if said.pop(_PREFIX + mode, False)]
    if other := sorted(key for key in said if key.startswith(_PREFIX) and said[key]):
        raise ValueError(f"the pooling {', '.join(other)} is not known")
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
