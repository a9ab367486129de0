"""Models of any architecture through transformers' forward, padded in groups of similar length.

The padded length depends on a text's own length alone: in bfloat16, padding changes rounding.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from cluster.batching import group_by_length
from cluster.engines.classifier.model.outputs import Pooling, to_scores
from cluster.engines.classifier.model.packed.layout import round_up
from cluster.engines.classifier.model.types import Head, Rows, TokenIds
from cluster.models.predict import UNLIMITED_TOKENS

PADDED_BITS = 4
"""Significant bits of padded lengths. With 4, padding is 3 % on average; fewer bits mean more
padding, more bits mean more and smaller forwards."""
MAX_CANDIDATES = 100
"""Candidates kept per mask; keeping the whole vocabulary would take up to 1 MB per mask."""

RAGGED_HEADS = ("embed-tokens", "embed-sparse", "token-classification", "fill-mask")
"""Heads whose results have a different size for each text."""

Inputs = dict[str, Tensor]


class TransformersModel:
    """``EncoderModel`` of any architecture.

    Args:
        network: A network with a head, or a plain encoder for embeddings.
        pad_id: Token id of padding.
        pooling: Pooling of embeddings.
        mask_id: Token id of the mask; -1 if the model fills no masks.
        max_tokens: Length of the longest text, and the limit of padding.
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
        self._selection = _select_encoder_output(self._encoder)
        self._heads = {
            "classify": self._classify,
            "logits": self._logits,
            "embed": self._embed,
            "embed-unnormalized": self._embed_unnormalized,
            "embed-tokens": self._embed_tokens,
            "embed-sparse": self._embed_sparse,
            "token-classification": self._label_tokens,
            "fill-mask": self._fill,
        }
        self.padding = 0.0

    def run(self, head: Head, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        compute = self._heads[head]
        rows: list[Rows] = []
        with torch.inference_mode():
            widths = [min(round_up(len(row), PADDED_BITS), self._max_tokens) for row in ids]
            for group in group_by_length(widths):
                rows += compute(self._pad(ids[group], widths[group.start]))
        return rows if head in RAGGED_HEADS else np.stack(rows)

    def _classify(self, inputs: Inputs) -> list[Rows]:
        logits = self._network(**inputs).logits
        return list(_numpy(to_scores(logits.float(), self._network.config)))

    def _logits(self, inputs: Inputs) -> list[Rows]:
        return list(_numpy(self._network(**inputs).logits.float()))

    def _embed(self, inputs: Inputs) -> list[Rows]:
        return self._pool(inputs, self._pooling)

    def _embed_unnormalized(self, inputs: Inputs) -> list[Rows]:
        return self._pool(inputs, replace(self._pooling, normalize=False))

    def _embed_tokens(self, inputs: Inputs) -> list[Rows]:
        vectors = _numpy(self._encoder(**inputs).last_hidden_state.float())
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(vectors, lengths, strict=True)]

    def _embed_sparse(self, inputs: Inputs) -> list[Rows]:
        """Return SPLADE's terms, log(1 + ReLU(largest logit)) of each token of the vocabulary."""
        logits = self._network(**inputs).logits.float()
        logits.masked_fill_(inputs["attention_mask"].unsqueeze(-1) == 0, -torch.inf)
        weights = logits.amax(1).relu().log1p()
        terms = [row.nonzero()[:, 0] for row in weights]
        pairs = zip(terms, weights, strict=True)
        return [_numpy(torch.stack([index.float(), row[index]], 1)) for index, row in pairs]

    def _pool(self, inputs: Inputs, pooling: Pooling) -> list[Rows]:
        hidden = self._encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        text_index, positions = mask.nonzero(as_tuple=True)
        lengths = mask.sum(1)
        starts = lengths.cumsum(0) - lengths
        tokens = hidden[text_index, positions]
        return list(_numpy(pooling(tokens, text_index, positions, starts)))

    def _label_tokens(self, inputs: Inputs) -> list[Rows]:
        scores = _numpy(self._network(**inputs).logits.float().softmax(-1))
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(scores, lengths, strict=True)]

    def _fill(self, inputs: Inputs) -> list[Rows]:
        """Return, per mask, the ids of the best tokens followed by their scores."""
        masks = self._selection.tokens = inputs["input_ids"].eq(self._mask_id)
        try:
            logits = self._network(**inputs).logits[0]
        finally:
            self._selection.tokens = None
        best = logits.float().softmax(-1).topk(min(MAX_CANDIDATES, logits.shape[-1]))
        rows = torch.cat([best.indices.float(), best.values], -1)  # float32 is exact up to 2^24
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


class _Selection(threading.local):
    """Tokens passed to the head. Thread-local, because the threads' models share a network."""

    tokens: Tensor | None = None
    """True for the selected tokens, [texts, tokens]; None selects all."""


def _select_encoder_output(encoder: Any) -> _Selection:
    """Make ``encoder`` return only the selected tokens, as one text, to the layers that follow.

    The vocabulary is by far the widest layer, so its head should compute the masks alone.
    """
    selection = _Selection()

    def select(_module: Any, _args: Any, output: Any) -> BaseModelOutput | None:
        if selection.tokens is None:
            return None
        return BaseModelOutput(last_hidden_state=output[0][selection.tokens][None])

    encoder.register_forward_hook(select)
    return selection


def _numpy(tensor: Tensor) -> Rows:
    return np.asarray(tensor.cpu().numpy(), np.float32)
