"""Any architecture through its own forward in transformers, padded in groups of like length.

How far a text is padded hangs on its own length alone: in bfloat16 each padding rounds differently.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from cluster.batching import group_by_length
from cluster.config import ClassifierTask
from cluster.engines.classifier.model.packed.layout import round_up
from cluster.engines.classifier.model.pooling import Pooling
from cluster.engines.classifier.model.scores import to_scores
from cluster.engines.classifier.model.types import Rows, TokenIds
from cluster.models.predict import UNLIMITED_TOKENS

PADDED_BITS = 4
"""Texts are padded to lengths with so many significant bits, by 3 % on average; with fewer lengths
there would be more padding, with more of them more and smaller forwards."""
MAX_CANDIDATES = 100
"""Tokens that are kept for each mask: a whole vocabulary for each would be up to a megabyte."""

Inputs = dict[str, Tensor]


class TransformersModel:
    """An ``EncoderModel`` of any architecture.

    Args:
        network: A network with a head, or an encoder if it need only embed.
        pad_id: The id that padding cells hold.
        pooling: How embeddings are made.
        mask_id: The id of the mask, for networks that fill it; -1: there is none.
        max_tokens: The longest text; nothing is padded beyond it.
    """

    def __init__(
        self,
        network: Any,
        pad_id: int,
        pooling: Pooling | None = None,
        mask_id: int = -1,
        max_tokens: int = UNLIMITED_TOKENS,
    ) -> None:
        self._network = network
        self._encoder = network.base_model
        self._pad_id = pad_id
        self._pooling = pooling or Pooling()
        self._mask_id = mask_id
        self._max_tokens = max_tokens
        self._chosen = _choosing(self._encoder)
        self._heads = {
            "classify": self._classify,
            "embed": self._embed,
            "token-classification": self._label_tokens,
            "fill-mask": self._fill,
        }
        self.padding = 0.0
        """See ``EncoderModel``."""

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        """See ``EncoderModel``."""
        head = self._heads[task]
        rows: list[Rows] = []
        with torch.inference_mode():
            widths = [min(round_up(len(row), PADDED_BITS), self._max_tokens) for row in ids]
            for group in group_by_length(widths):
                rows += head(self._pad(ids[group], widths[group.start]))
        return np.stack(rows) if task in ("classify", "embed") else rows

    def _classify(self, inputs: Inputs) -> list[Rows]:
        logits = self._network(**inputs).logits
        return list(_numpy(to_scores(logits.float(), self._network.config)))

    def _embed(self, inputs: Inputs) -> list[Rows]:
        hidden = self._encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        owners, positions = mask.nonzero(as_tuple=True)
        lengths = mask.sum(1)
        firsts = lengths.cumsum(0) - lengths
        return list(_numpy(self._pooling(hidden[owners, positions], owners, positions, firsts)))

    def _label_tokens(self, inputs: Inputs) -> list[Rows]:
        scores = _numpy(self._network(**inputs).logits.float().softmax(-1))
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(scores, lengths, strict=True)]

    def _fill(self, inputs: Inputs) -> list[Rows]:
        """For each mask of a text, the ids of the best tokens and then their scores."""
        masks = self._chosen.tokens = inputs["input_ids"].eq(self._mask_id)
        try:
            logits = self._network(**inputs).logits[0]
        finally:
            self._chosen.tokens = None
        best = logits.float().softmax(-1).topk(min(MAX_CANDIDATES, logits.shape[-1]))
        rows = torch.cat([best.indices.float(), best.values], -1)  # ids are exact up to 2^24
        return [_numpy(part) for part in torch.split(rows, masks.sum(1).tolist())]

    def _pad(self, ids: Sequence[TokenIds], width: int) -> Inputs:
        cells = np.full((len(ids), width), self._pad_id, np.int64)
        mask = np.zeros(cells.shape, np.int64)
        for row, text in enumerate(ids):
            cells[row, : len(text)] = text
            mask[row, : len(text)] = 1
        self.padding += cells.size - int(mask.sum())
        inputs = {"attention_mask": mask}
        if (second := cells < 0).any():
            cells = np.where(second, ~cells, cells)
            inputs["token_type_ids"] = second.astype(np.int64)
        inputs["input_ids"] = cells
        device = self._network.device
        return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


class _Chosen(threading.local):
    """Each thread's own, since the threads' models share a network."""

    tokens: Tensor | None = None
    """[texts, tokens]; None: all."""


def _choosing(encoder: Any) -> _Chosen:
    """Have ``encoder`` give no more than the chosen tokens, as if of one text, to what follows.

    The vocabulary is by far the widest layer, so its head is to be given the masks alone.
    """
    chosen = _Chosen()

    def choose(_module: Any, _args: Any, output: Any) -> BaseModelOutput | None:
        if chosen.tokens is None:
            return None
        return BaseModelOutput(last_hidden_state=output[0][chosen.tokens][None])

    encoder.register_forward_hook(choose)
    return chosen


def _numpy(tensor: Tensor) -> Rows:
    return np.asarray(tensor.cpu().numpy(), np.float32)
