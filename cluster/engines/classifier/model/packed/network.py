"""BERT over packed tokens, with interchangeable attention and linear layers.

Keeps none of the modules that it is made from. Attention and devices are up to ``cpu`` and ``gpu``.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel

from cluster.engines.classifier.model.outputs import Pooling, to_scores
from cluster.engines.classifier.model.packed.linear import (
    Arithmetic,
    Linear,
    PlainLinear,
    Weights,
    make_linear,
)
from cluster.engines.classifier.model.types import Head


@dataclass(frozen=True, slots=True)
class Packed:
    """Tokens of several texts, end to end."""

    tokens: Tensor
    second: Tensor | None
    """1 for tokens of the second segment, [tokens, 1]; None if there are none."""
    positions: Tensor
    starts: Tensor
    """Row of each text's first token."""
    text_index: Tensor
    """Text of each token; the number of texts marks padding."""


class Attention(Protocol):
    """Attention within each text of a batch; queries are already scaled."""

    def attend_all(self, projected: Tensor) -> Tensor:
        """Map query, key and value side by side, [tokens, 3 * width], to [tokens, width]."""

    def attend_first(self, query: Tensor, projected: Tensor) -> Tensor:
        """Attend from each text's first token only; ``query`` and result are [texts, width].

        ``projected`` has key and value of all tokens side by side, [tokens, 2 * width].
        """


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @classmethod
    def from_module(cls, module: Any, dtype: torch.dtype) -> "Norm":
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """Encoder layer: attention and feed-forward network, each with residual and norm."""

    query_key_value: Linear
    """Projections side by side; queries are divided by the root of the head size."""
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm

    @classmethod
    def from_module(
        cls, name: str, module: Any, activation: str, arithmetic: Arithmetic
    ) -> "Layer":
        """Copy a ``BertLayer``; its linear layers are named ``name.part``."""
        dense = module.attention.output.dense
        up = Weights.from_modules(module.intermediate.dense, activation=activation)
        down = Weights.from_modules(module.output.dense)
        linear, hidden = arithmetic.linear, arithmetic.hidden
        return cls(
            query_key_value=linear(f"{name}.query_key_value", _query_key_value(module)),
            attention_out=linear(f"{name}.attention_out", Weights.from_modules(dense)),
            attention_norm=Norm.from_module(module.attention.output.LayerNorm, hidden),
            up=linear(f"{name}.up", up),
            down=linear(f"{name}.down", down),
            norm=Norm.from_module(module.output.LayerNorm, hidden),
        )

    def __call__(self, attention: Attention, hidden: Tensor) -> Tensor:
        return self.finish(hidden, attention.attend_all(self.query_key_value(hidden)))

    def finish(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Compute everything after attention for the given rows, both [rows, width]."""
        hidden = self.attention_norm(self.attention_out.with_residual(context, hidden))
        return self.norm(self.down.with_residual(self.up(hidden), hidden))


@dataclass(frozen=True, slots=True)
class FirstTokenLayer:
    """Last layer of a model that needs only each text's first token of it."""

    layer: Layer
    query: Linear
    key_value: Linear

    @classmethod
    def from_module(
        cls, name: str, module: Any, layer: Layer, arithmetic: Arithmetic
    ) -> "FirstTokenLayer":
        """Copy the ``BertLayer`` that ``layer`` is a copy of."""
        weights = _query_key_value(module)
        width = weights.weight.shape[1]
        query = arithmetic.linear(f"{name}.query", weights.rows(0, width))
        key_value = arithmetic.linear(f"{name}.key_value", weights.rows(width, None))
        return cls(layer, query, key_value)

    def __call__(self, attention: Attention, hidden: Tensor, starts: Tensor) -> Tensor:
        """Map [tokens, width] to [texts, width]; ``starts`` are the rows of first tokens."""
        rows = hidden.index_select(0, starts)
        context = attention.attend_first(self.query(rows), self.key_value(hidden))
        return self.layer.finish(rows, context)


class PackedNetwork:
    """Copied weights of a ``BertForSequenceClassification`` or a ``BertModel``."""

    def __init__(self, network: Any, arithmetic: Arithmetic, pooling: Pooling) -> None:
        self._pooling = pooling
        bert, self._config = network.base_model, network.config
        dtype = arithmetic.hidden
        table = bert.embeddings
        self._words = table.word_embeddings.weight.detach().to(dtype)
        # All tokens but those of second texts have type 0: add its vector to the positions once.
        types = table.token_type_embeddings.weight.detach().to(dtype)
        self._second = types[1] - types[0] if len(types) > 1 else None
        self._positions = table.position_embeddings.weight.detach().to(dtype) + types[0]
        self._norm = Norm.from_module(table.LayerNorm, dtype)
        names = [f"layers.{i}" for i in range(len(bert.encoder.layer))]
        self._layers = [
            Layer.from_module(name, module, self._config.hidden_act, arithmetic)
            for name, module in zip(names, bert.encoder.layer, strict=True)
        ]
        self._first_token_layer: FirstTokenLayer | None = None
        self._head: tuple[Linear, Linear] | None = None
        if isinstance(network, BertForSequenceClassification):
            self._first_token_layer = FirstTokenLayer.from_module(
                names[-1], bert.encoder.layer[-1], self._layers[-1], arithmetic
            )
            pooler = Weights.from_modules(bert.pooler.dense)
            classifier = Weights.from_modules(network.classifier)
            self._head = make_linear("pooler", pooler.to(dtype)), PlainLinear(classifier.to(dtype))

    def run(self, head: Head, packed: Packed, attention: Attention) -> Tensor:
        """Return [texts, labels or width]; [tokens, width] for ``embed-tokens``."""
        if head == "classify":
            return to_scores(self._logits(packed, attention), self._config)
        if head == "logits":
            return self._logits(packed, attention)
        hidden = self._layers[-1](attention, self._below_last(packed, attention))
        if head == "embed-tokens":
            return hidden.float()
        pooling = self._pooling if head == "embed" else replace(self._pooling, normalize=False)
        return pooling(hidden, packed.text_index, packed.positions, packed.starts)

    def _logits(self, packed: Packed, attention: Attention) -> Tensor:
        """Return [texts, labels]; the last layer computes only first tokens."""
        assert self._first_token_layer is not None
        assert self._head is not None
        pooler, classifier = self._head
        hidden = self._below_last(packed, attention)
        first = self._first_token_layer(attention, hidden, packed.starts)
        return classifier(pooler(first).tanh()).float()

    def _below_last(self, packed: Packed, attention: Attention) -> Tensor:
        hidden = functional.embedding(packed.tokens, self._words)
        hidden += functional.embedding(packed.positions, self._positions)
        if packed.second is not None and self._second is not None:
            hidden += packed.second * self._second
        hidden = self._norm(hidden)
        for layer in self._layers[:-1]:
            hidden = layer(attention, hidden)
        return hidden


def supports(network: Any) -> bool:
    """Return True if ``network`` is exactly the architecture that ``PackedNetwork`` computes."""
    if type(network) not in (BertForSequenceClassification, BertModel):
        return False
    config = network.config
    has_named_activation = isinstance(config.hidden_act, str)
    return has_named_activation and not config.is_decoder and config.num_hidden_layers > 0


def _query_key_value(module: Any) -> Weights:
    """Return the three projections of a ``BertLayer`` as one, with scaled queries."""
    attention = module.attention.self
    weights = Weights.from_modules(attention.query, attention.key, attention.value)
    width = weights.weight.shape[1]
    scale = (width // attention.num_attention_heads) ** -0.5
    return weights.scaled(scale, width)
