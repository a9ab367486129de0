"""One encoder layer of BERT, in linear layers of whatever make."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.engines.classifier.model.packed.linear import Arithmetic, Linear, Weights


class Attention(Protocol):
    """Attention within each text of a batch; queries are scaled already."""

    def all(self, projected: Tensor) -> Tensor:
        """Query, key and value side by side, [tokens, 3 * width], to [tokens, width]."""

    def firsts(self, query: Tensor, projected: Tensor) -> Tensor:
        """For each text's first token alone: its query, [texts, width], and all tokens' key and
        value side by side, [tokens, 2 * width], to [texts, width]."""


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, width] → the same"""
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> "Norm":
        """A module's."""
        return cls(module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and feed-forward network, each with its residual and its norm."""

    query_key_value: Linear
    """The query's part gives it divided by the root of the head size already."""
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm

    @classmethod
    def of(cls, name: str, layer: Any, activation: str, how: Arithmetic) -> "Layer":
        """A transformers layer's; its linear layers have the names ``name.part``."""
        dense = layer.attention.output.dense
        up = Weights.of(layer.intermediate.dense, activation=activation)
        return cls(
            query_key_value=how.linear(f"{name}.query_key_value", query_key_value(layer)),
            attention_out=how.linear(f"{name}.attention_out", Weights.of(dense)),
            attention_norm=Norm.of(layer.attention.output.LayerNorm, how.hidden),
            up=how.linear(f"{name}.up", up),
            down=how.linear(f"{name}.down", Weights.of(layer.output.dense)),
            norm=Norm.of(layer.output.LayerNorm, how.hidden),
        )

    def __call__(self, attention: Attention, hidden: Tensor) -> Tensor:
        """[tokens, width] → the same"""
        return self.finish(hidden, attention.all(self.query_key_value(hidden)))

    def finish(self, hidden: Tensor, context: Tensor) -> Tensor:
        """All that follows attention, for the rows given: [rows, width] twice → once."""
        hidden = self.attention_norm(self.attention_out.plus(context, hidden))
        return self.norm(self.down.plus(self.up(hidden), hidden))


@dataclass(frozen=True, slots=True)
class FirstTokenLayer:
    """The last layer of a model that needs nothing of it but each text's first token."""

    layer: Layer
    query: Linear
    key_value: Linear

    @classmethod
    def of(cls, name: str, layer: Any, made: Layer, how: Arithmetic) -> "FirstTokenLayer":
        """Of the same transformers layer that ``made`` is of."""
        weights = query_key_value(layer)
        width = weights.weight.shape[1]
        query = how.linear(f"{name}.query", weights.rows(0, width))
        return cls(made, query, how.linear(f"{name}.key_value", weights.rows(width, None)))

    def __call__(self, attention: Attention, hidden: Tensor, firsts: Tensor) -> Tensor:
        """[tokens, width], and which of them are first, → [texts, width]"""
        rows = hidden.index_select(0, firsts)
        context = attention.firsts(self.query(rows), self.key_value(hidden))
        return self.layer.finish(rows, context)


def query_key_value(layer: Any) -> Weights:
    """The three projections of a transformers layer as one, the query scaled."""
    attention = layer.attention.self
    weights = Weights.of(attention.query, attention.key, attention.value)
    width = weights.weight.shape[1]
    scale = (width // attention.num_attention_heads) ** -0.5
    return weights.scaled(scale, width)
