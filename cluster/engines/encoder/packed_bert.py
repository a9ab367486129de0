"""BERT without padding: the tokens of a batch end to end in one [tokens, hidden] matrix.

Every linear layer and LayerNorm runs once over that matrix; attention runs once for each group of
texts of equal length (a group of one costs per text what a large one does), so no cell is padding
anywhere. To classify, the last layer computes the first token of each text alone. Plain torch
operations, in the type and on the device of the network it is made from; it keeps none of its
modules but the activation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel

from cluster.batching import group_by_length
from cluster.config import ClassifierTask
from cluster.engines.encoder.jobs import Rows, TokenIds
from cluster.engines.encoder.pooling import Pooling
from cluster.engines.encoder.scores import to_scores


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    @classmethod
    def of(cls, *modules: Any) -> "_Linear":
        """One layer that gives the outputs of all ``modules`` side by side."""
        if len(modules) == 1:
            return cls(modules[0].weight.detach(), modules[0].bias.detach())
        weights = torch.cat([module.weight.detach() for module in modules])
        return cls(weights, torch.cat([module.bias.detach() for module in modules]))

    def rows(self, start: int, stop: int | None) -> "_Linear":
        """The part of the layer that gives these outputs; shares the weights."""
        return _Linear(self.weight[start:stop], self.bias[start:stop])


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @classmethod
    def of(cls, module: Any) -> "_Norm":
        return cls(module.weight.detach(), module.bias.detach(), module.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Linear
    attention_out: _Linear
    attention_norm: _Norm
    up: _Linear
    activation: Callable[[Tensor], Tensor]
    down: _Linear
    norm: _Norm

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention = layer.attention.self
        return cls(
            qkv=_Linear.of(attention.query, attention.key, attention.value),
            attention_out=_Linear.of(layer.attention.output.dense),
            attention_norm=_Norm.of(layer.attention.output.LayerNorm),
            up=_Linear.of(layer.intermediate.dense),
            activation=layer.intermediate.intermediate_act_fn,
            down=_Linear.of(layer.output.dense),
            norm=_Norm.of(layer.output.LayerNorm),
        )

    def finish(self, hidden: Tensor, context: Tensor) -> Tensor:
        """All that follows attention, for the rows given: [rows, hidden] twice → once."""
        hidden = self.attention_norm(self.attention_out(context).add_(hidden))
        return self.norm(self.down(self.activation(self.up(hidden))).add_(hidden))


@dataclass(frozen=True, slots=True)
class _Packing:
    """Where the texts of a batch lie in its matrix; texts of one length are neighbours."""

    tokens: Tensor
    positions: Tensor
    second: Tensor | None
    """[tokens, 1], 1 where a token is of the second segment; None: no token is."""
    firsts: Tensor
    """The row of each text's first token."""
    groups: list[tuple[int, int]]
    """Runs of texts of equal length: how many, and their length."""

    @classmethod
    def of(cls, ids: Sequence[TokenIds], device: torch.device) -> "_Packing":
        lengths = np.array([len(row) for row in ids])
        firsts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
        runs = group_by_length(lengths.tolist())
        tokens = np.concatenate(ids)
        second = None
        if (marked := tokens < 0).any():
            tokens = np.where(marked, ~tokens, tokens)
            second = torch.from_numpy(marked[:, None]).to(device)
        return cls(
            tokens=torch.from_numpy(tokens).to(device),
            positions=torch.from_numpy(positions).to(device),
            second=second,
            firsts=torch.from_numpy(firsts).to(device),
            groups=[(run.stop - run.start, int(lengths[run.start])) for run in runs],
        )

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Rows of tokens by group: [tokens, width] → [texts, length, width] each."""
        parts = torch.split(matrix, [texts * length for texts, length in self.groups])
        return [
            part.view(texts, length, -1)
            for part, (texts, length) in zip(parts, self.groups, strict=True)
        ]


class PackedBert:
    """A ``BertForSequenceClassification``, or a ``BertModel`` that need only embed.

    Use ``supports`` first.

    Args:
        network: Its weights are shared, not copied, where the layout allows it.
        pooling: How embeddings are made.
    """

    def __init__(self, network: Any, pooling: Pooling | None = None) -> None:
        bert = network.base_model
        self._pooling = pooling or Pooling()
        table = bert.embeddings
        self._config = network.config
        self._heads = int(network.config.num_attention_heads)
        self._words = table.word_embeddings.weight.detach()
        # All but the pairs of texts have the token type 0, so its vector belongs to the positions.
        types = table.token_type_embeddings.weight.detach()
        self._positions = table.position_embeddings.weight.detach() + types[0]
        self._second = types[1] - types[0] if len(types) > 1 else None
        self._norm = _Norm.of(table.LayerNorm)
        self._layers = [_Layer.of(layer) for layer in bert.encoder.layer]
        self._head: tuple[_Linear, _Linear] | None = None
        if isinstance(network, BertForSequenceClassification):
            self._head = _Linear.of(bert.pooler.dense), _Linear.of(network.classifier)

    @staticmethod
    def supports(network: Any) -> bool:
        """Whether ``network`` is exactly the architecture that this computes."""
        plain = type(network) in (BertForSequenceClassification, BertModel)
        return plain and not network.config.is_decoder and len(network.base_model.encoder.layer) > 0

    @torch.inference_mode()
    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """See ``EncoderModel``."""
        packing = _Packing.of(ids, self._words.device)
        hidden = functional.embedding(packing.tokens, self._words)
        hidden = hidden + functional.embedding(packing.positions, self._positions)
        if packing.second is not None and self._second is not None:
            hidden += packing.second * self._second
        hidden = self._norm(hidden)
        for layer in self._layers[:-1]:
            hidden = self._layer(layer, packing, hidden)
        finish = self._classify if task == "classify" else self._embed
        return np.asarray(finish(packing, hidden).cpu().numpy(), np.float32)

    def _layer(self, layer: _Layer, packing: _Packing, hidden: Tensor) -> Tensor:
        context = [self._attend(*part.chunk(3, -1)) for part in packing.split(layer.qkv(hidden))]
        return layer.finish(hidden, torch.cat(context) if len(context) > 1 else context[0])

    def _classify(self, packing: _Packing, hidden: Tensor) -> Tensor:
        """Through the last layer for first tokens alone, and the head: → [texts, labels]."""
        assert self._head is not None
        layer = self._layers[-1]
        firsts = hidden[packing.firsts]
        width = hidden.shape[1]
        sizes = [texts for texts, _ in packing.groups]
        queries = torch.split(layer.qkv.rows(0, width)(firsts), sizes)
        keys_values = packing.split(layer.qkv.rows(width, None)(hidden))
        context = [
            self._attend(query.unsqueeze(1), *part.chunk(2, -1))
            for query, part in zip(queries, keys_values, strict=True)
        ]
        pooler, classifier = self._head
        pooled = pooler(layer.finish(firsts, torch.cat(context))).tanh()
        return to_scores(classifier(pooled).float(), self._config)

    def _embed(self, packing: _Packing, hidden: Tensor) -> Tensor:
        """Through the last layer, and each text's tokens pooled."""
        hidden = self._layer(self._layers[-1], packing, hidden)
        return torch.cat([self._pooling(part) for part in packing.split(hidden)])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[texts, queries, width] and [texts, length, width] twice → [texts * queries, width]."""
        q, k, v = (self._by_head(x) for x in (query, key, value))
        context = functional.scaled_dot_product_attention(q, k, v)
        return context.transpose(1, 2).reshape(-1, query.shape[-1])

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self._heads, -1).transpose(1, 2)
