"""BERT without padding, on a CPU: one batch at a time, each laid out afresh.

Every linear layer and LayerNorm runs once over the [tokens, hidden] matrix of the batch, attention
once for each group of texts of like length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cluster.config import ClassifierTask
from cluster.engines.classifier.model.packed import network as networks
from cluster.engines.classifier.model.packed.attention import GroupedAttention
from cluster.engines.classifier.model.packed.layout import Layout
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.pooling import Pooling
from cluster.engines.classifier.model.types import Rows, TokenIds


class PackedBert:
    """A ``BertForSequenceClassification``, or a ``BertModel`` that need only embed.

    Use ``supports`` first.

    Args:
        network: Is left as it is.
        how: The types and layers that it computes with; None: the network's type.
        pooling: How embeddings are made.
    """

    supports = staticmethod(networks.supports)

    def __init__(
        self, network: Any, how: Arithmetic | None = None, pooling: Pooling | None = None
    ) -> None:
        how = how or Arithmetic.plain(network.dtype)
        self._network = networks.PackedNetwork(network, how, pooling or Pooling())
        self._heads = int(network.config.num_attention_heads)
        self._mask_dtype = how.attention
        # A token takes 12 * width**2 multiplications in a layer's products, a pair 2 * width.
        self._tokens_per_pair = 1 / (6 * network.config.hidden_size)
        self.padding = 0.0
        """See ``EncoderModel``."""

    @torch.inference_mode()
    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """See ``EncoderModel``."""
        layout = Layout.of(ids, self._heads, self._mask_dtype)
        self.padding += len(layout.packed.tokens) - layout.num_tokens
        self.padding += layout.padded_pairs * self._tokens_per_pair
        attention = GroupedAttention(layout, self._heads)
        if task == "classify":
            rows = self._network.scores(layout.packed, attention)
        else:
            rows = self._network.vectors(layout.packed, attention)
        return np.asarray(rows.numpy()[: len(ids)], np.float32)
