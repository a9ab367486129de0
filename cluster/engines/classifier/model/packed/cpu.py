"""BERT without padding on a CPU.

Every linear layer and LayerNorm runs once over the [tokens, hidden] matrix of a batch. Attention
runs once per group of texts of similar length, as batched matrix products over contiguous operands.
PyTorch's own attention calls two tiny products per head and text: 65 to 75 µs for 26 tokens and 12
heads on one core, against 40 µs here, gathers included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.layout import Group, Layout
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.packed.network import PackedNetwork
from cluster.engines.classifier.model.types import Head, Rows, TokenIds, split_by_length


class PackedBert:
    """``EncoderModel`` of BERT on a CPU, for networks that ``packed.network.supports``.

    Args:
        network: The model to copy; it is not changed.
        arithmetic: Number types and linear layers; None uses the network's type.
        pooling: Pooling of embeddings.
    """

    def __init__(
        self, network: Any, arithmetic: Arithmetic | None = None, pooling: Pooling | None = None
    ) -> None:
        arithmetic = arithmetic or Arithmetic.plain(network.dtype)
        self._network = PackedNetwork(network, arithmetic, pooling or Pooling())
        self._heads = int(network.config.num_attention_heads)
        self._mask_dtype = arithmetic.attention
        # Multiplications per layer: 12 * width**2 per token, 2 * width per pair in attention.
        self._tokens_per_pair = 1 / (6 * network.config.hidden_size)
        self.padding = 0.0

    @torch.inference_mode()
    def run(self, head: Head, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        layout = Layout.for_lengths([len(row) for row in ids], self._heads, self._mask_dtype)
        self.padding += len(layout.positions) - layout.num_tokens
        self.padding += layout.padded_pairs * self._tokens_per_pair
        attention = GroupedAttention(layout, self._heads)
        rows = np.asarray(self._network.run(head, layout.pack(ids), attention).numpy(), np.float32)
        return split_by_length(rows, ids) if head == "embed-tokens" else rows[: len(ids)]


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """``Attention`` of one batch, group by group."""

    layout: Layout
    heads: int

    def attend_all(self, projected: Tensor) -> Tensor:
        width = projected.shape[1] // 3
        size = width // self.heads
        rows = projected.view(-1, size).index_select(0, self.layout.query_key_value)
        context = rows.new_empty(self.heads * sum(g.queries for g in self.layout.groups), size)
        start = first = 0
        for group in self.layout.groups:
            stop = first + group.queries * self.heads
            queries = start + stop - first
            query = rows[start:queries].view(-1, group.length, size)
            start = queries + 2 * group.texts * group.keys * self.heads
            out = context[first:stop].view_as(query)
            _attend(group, query, rows[queries:start], out)
            first = stop
        return context.index_select(0, self.layout.back).view(-1, width)

    def attend_first(self, query: Tensor, projected: Tensor) -> Tensor:
        size = query.shape[1] // self.heads
        queries = query.view(-1, 1, size)
        rows = projected.view(-1, size).index_select(0, self.layout.key_value)
        context = torch.zeros_like(queries)  # rows after the last text stay zero
        start = first = 0
        for group in self.layout.groups:
            stop = first + group.texts * self.heads
            end = start + 2 * group.texts * group.keys * self.heads
            _attend(group, queries[first:stop], rows[start:end], context[first:stop])
            start, first = end, stop
        return context.view_as(query)


def _attend(group: Group, query: Tensor, key_value: Tensor, out: Tensor) -> None:
    """Write the attention of ``query``, [texts * heads, queries, size], to ``out``.

    ``key_value`` has the rows of all keys, then those of all values.
    """
    key, value = key_value.view(2, -1, group.keys, query.shape[2]).unbind(0)
    keys = key.transpose(1, 2)
    scores = query.new_empty(len(query), query.shape[1], group.keys)
    for part in group.portions:
        torch.bmm(query[part], keys[part], out=scores[part])
    if group.mask is not None:
        scores.view(group.texts, -1, *scores.shape[1:]).add_(group.mask)
    weights = torch.softmax(scores, -1)
    for part in group.portions:
        torch.bmm(weights[part], value[part], out=out[part])
