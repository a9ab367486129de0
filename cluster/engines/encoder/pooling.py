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


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).sqrt()


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, -torch.inf).amax(1)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The later a token stands, the more it weighs."""
    weights = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None] * mask
    return (hidden * weights).sum(1) / weights.sum(1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    lasts = mask.sum(1).long() - 1
    return hidden.gather(1, lasts[:, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


# In the order in which sentence-transformers puts several side by side.
_MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls_token": lambda hidden, _: hidden[:, 0],
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

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[texts, length, width] → float32 [texts, width * modes].

        Args:
            hidden: Padded at the end.
            mask: [texts, length], 0 where padding is; None: there is none.
        """
        hidden = hidden.float()
        weights = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        weights = weights.unsqueeze(-1).float()
        vectors = torch.cat([_MODES[mode](hidden, weights) for mode in self.modes], -1)
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
