"""BERT without padding: the tokens of a batch end to end in one [tokens, hidden] matrix.

Every linear layer and LayerNorm runs once over that matrix, attention once for each group of texts
of like length. To classify, the last layer computes the first token of each text alone. It keeps
none of the network's modules.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel

from cluster.config import ClassifierTask
from cluster.engines.encoder.jobs import Rows, TokenIds
from cluster.engines.encoder.packed.layer import FirstTokenLayer, Layer, Norm
from cluster.engines.encoder.packed.layout import Layout
from cluster.engines.encoder.packed.linear import Arithmetic, Linear, PlainLinear, Weights
from cluster.engines.encoder.pooling import Pooling
from cluster.engines.encoder.scores import to_scores


class PackedBert:
    """A ``BertForSequenceClassification``, or a ``BertModel`` that need only embed.

    Use ``supports`` first.

    Args:
        network: Is left as it is.
        how: The types and layers that it computes with; None: the network's type.
        pooling: How embeddings are made.
    """

    def __init__(
        self, network: Any, how: Arithmetic | None = None, pooling: Pooling | None = None
    ) -> None:
        bert, config = network.base_model, network.config
        table = bert.embeddings
        how = how or Arithmetic.plain(network.dtype)
        self._config = config
        self._pooling = pooling or Pooling()
        self._words = table.word_embeddings.weight.detach().to(how.hidden)
        self._mask_dtype = how.attention
        # All but the pairs of texts have the token type 0, so its vector belongs to the positions.
        types = table.token_type_embeddings.weight.detach().to(how.hidden)
        self._second = types[1] - types[0] if len(types) > 1 else None
        self._positions = table.position_embeddings.weight.detach().to(how.hidden) + types[0]
        self._norm = Norm.of(table.LayerNorm, how.hidden)
        names = [f"layers.{i}" for i in range(len(bert.encoder.layer))]
        self._layers = [
            Layer.of(name, layer, config.hidden_act, how)
            for name, layer in zip(names, bert.encoder.layer, strict=True)
        ]
        self._first_tokens: FirstTokenLayer | None = None
        self._head: tuple[Linear, Linear] | None = None
        if isinstance(network, BertForSequenceClassification):
            last = bert.encoder.layer[-1]
            self._first_tokens = FirstTokenLayer.of(names[-1], last, self._layers[-1], how)
            pooler, classifier = Weights.of(bert.pooler.dense), Weights.of(network.classifier)
            self._head = PlainLinear(pooler.to(how.hidden)), PlainLinear(classifier.to(how.hidden))
        self.padding = 0
        """Cells of attention that held no token, since the beginning."""

    @staticmethod
    def supports(network: Any) -> bool:
        """Whether ``network`` is exactly the architecture that this computes."""
        if type(network) not in (BertForSequenceClassification, BertModel):
            return False
        config = network.config
        named = isinstance(config.hidden_act, str)
        return named and not config.is_decoder and config.num_hidden_layers > 0

    @torch.inference_mode()
    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """See ``EncoderModel``."""
        layout = Layout.of(ids, self._config.num_attention_heads, self._mask_dtype)
        self.padding += layout.padding
        hidden = self._embeddings(layout)
        for layer in self._layers[:-1]:
            hidden = layer(layout, hidden)
        rows = self._classify(layout, hidden) if task == "classify" else self._embed(layout, hidden)
        return np.asarray(rows.numpy(), np.float32)

    def _embeddings(self, layout: Layout) -> Tensor:
        hidden = functional.embedding(layout.tokens, self._words)
        hidden += functional.embedding(layout.positions, self._positions)
        if layout.second is not None and self._second is not None:
            hidden += layout.second * self._second
        return self._norm(hidden)

    def _classify(self, layout: Layout, hidden: Tensor) -> Tensor:
        """Through the last layer for first tokens alone, and the head: → [texts, labels]."""
        assert self._first_tokens is not None
        assert self._head is not None
        pooler, classifier = self._head
        firsts = self._first_tokens(layout, hidden)
        return to_scores(classifier(pooler(firsts).tanh()).float(), self._config)

    def _embed(self, layout: Layout, hidden: Tensor) -> Tensor:
        """Through the last layer, and each text's tokens pooled."""
        hidden = self._layers[-1](layout, hidden)
        return torch.cat([self._pooling(*group) for group in layout.padded(hidden)])
