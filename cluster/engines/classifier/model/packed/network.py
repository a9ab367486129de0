"""BERT as a function of packed tokens, whatever computes its attention and its linear layers.

It keeps none of the modules it is made from, and knows nothing of batches or devices' manners.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel

from cluster.engines.classifier.model.packed.layer import Attention, FirstTokenLayer, Layer, Norm
from cluster.engines.classifier.model.packed.linear import Arithmetic, Linear, PlainLinear, Weights
from cluster.engines.classifier.model.pooling import Pooling
from cluster.engines.classifier.model.scores import to_scores


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of some texts, end to end."""

    tokens: Tensor
    second: Tensor | None
    """[tokens, 1], 1 where a token is of the second segment; None: no token is."""
    positions: Tensor
    firsts: Tensor
    """The row of each text's first token."""
    owners: Tensor
    """The text that each token is of; one after the last text is nobody's."""


class PackedNetwork:
    """The weights of a ``BertForSequenceClassification`` or a ``BertModel``.

    Args:
        network: Is left as it is.
        how: The types and layers that it computes with.
        pooling: How embeddings are made.
    """

    def __init__(self, network: Any, how: Arithmetic, pooling: Pooling) -> None:
        self._pooling = pooling
        bert, self._config = network.base_model, network.config
        table = bert.embeddings
        self._words = table.word_embeddings.weight.detach().to(how.hidden)
        # All but the pairs of texts have the token type 0, so its vector belongs to the positions.
        types = table.token_type_embeddings.weight.detach().to(how.hidden)
        self._second = types[1] - types[0] if len(types) > 1 else None
        self._positions = table.position_embeddings.weight.detach().to(how.hidden) + types[0]
        self._norm = Norm.of(table.LayerNorm, how.hidden)
        names = [f"layers.{i}" for i in range(len(bert.encoder.layer))]
        self._layers = [
            Layer.of(name, layer, self._config.hidden_act, how)
            for name, layer in zip(names, bert.encoder.layer, strict=True)
        ]
        self._first_tokens: FirstTokenLayer | None = None
        self._head: tuple[Linear, Linear] | None = None
        if isinstance(network, BertForSequenceClassification):
            last = bert.encoder.layer[-1]
            self._first_tokens = FirstTokenLayer.of(names[-1], last, self._layers[-1], how)
            pooler, classifier = Weights.of(bert.pooler.dense), Weights.of(network.classifier)
            self._head = PlainLinear(pooler.to(how.hidden)), PlainLinear(classifier.to(how.hidden))

    def scores(self, packed: Packed, attention: Attention) -> Tensor:
        """[texts, labels]; the last layer computes first tokens alone."""
        assert self._first_tokens is not None
        assert self._head is not None
        pooler, classifier = self._head
        hidden = self._below_last(packed, attention)
        firsts = self._first_tokens(attention, hidden, packed.firsts)
        return to_scores(classifier(pooler(firsts).tanh()).float(), self._config)

    def vectors(self, packed: Packed, attention: Attention) -> Tensor:
        """[texts, width]: what the last layer gives, pooled."""
        hidden = self._layers[-1](attention, self._below_last(packed, attention))
        return self._pooling(hidden, packed.owners, packed.positions, packed.firsts)

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
    """Whether ``network`` is exactly the architecture that ``PackedNetwork`` computes."""
    if type(network) not in (BertForSequenceClassification, BertModel):
        return False
    config = network.config
    named = isinstance(config.hidden_act, str)
    return named and not config.is_decoder and config.num_hidden_layers > 0
