"""Models in the configured precision, made from a float32 network.

Chooses the fastest implementation that architecture, device and configuration allow, and measures
the agreement of low precision. Runs on the model thread.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.config import TASK_HEADS, ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.agreement import (
    Agreement,
    AgreementStore,
    batches_by_length,
    measure_agreement,
    require_agreement,
)
from cluster.engines.classifier.model.check_texts import check_texts
from cluster.engines.classifier.model.device import choose_precision
from cluster.engines.classifier.model.outputs import Pooling
from cluster.engines.classifier.model.packed.cpu import PackedBert
from cluster.engines.classifier.model.packed.gpu import VarlenBert
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.packed.network import supports
from cluster.engines.classifier.model.packed.quantize import (
    RangeObserver,
    observed_arithmetic,
    quantized_arithmetic,
)
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import EncoderModel, Text, TokenIds
from cluster.errors import ConfigError

log = logging.getLogger(__name__)

PAIR_TASKS = {"score", "rerank", "next-sentence"}
"""Tasks whose inputs are pairs of texts."""
_HEADS: Mapping[str | None, ClassifierTask] = {
    "ForSequenceClassification": "classify",
    "ForNextSentencePrediction": "classify",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    None: "embed",
}
"""Head to compute by the suffix of the architecture's name."""


def computed_heads(config: ClassifierConfig) -> tuple[ClassifierTask, ...]:
    """Return the distinct heads that the configured tasks make the model compute."""
    return tuple(dict.fromkeys(_HEADS[TASK_HEADS[task]] for task in config.tasks))


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model and its precision."""

    model: EncoderModel
    precision: str
    agreement: Agreement | None
    """Agreement with float32; None for float32 itself."""


class ModelBuilder:
    """Builder of models of one network.

    Args:
        config: The pool.
        path: The model's directory.
        network: The float32 network on its device.
        tokenizer: The model's tokenizer.
        pooling: Pooling of embeddings.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        path: str,
        network: Any,
        tokenizer: TextTokenizer,
        pooling: Pooling,
    ) -> None:
        self._config = config
        self._path = path
        self._network = network
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._heads = computed_heads(config)
        self._supported = supports(network)
        self._packs_on_cpu = self._supported and network.device.type == "cpu"

    def build(self) -> BuiltModel:
        """Build the model in the configured precision.

        With dtype ``auto``, fall back to float32 if the agreement is too low.

        Raises:
            ConfigError: The precision is not available here, or does not agree with float32.
        """
        precision = choose_precision(self._config, self._network.device)
        if precision == "float32":
            return BuiltModel(self._build_in(torch.float32), precision, None)
        model = self.build_unchecked(precision)
        agreement = self._agreement(model, precision)
        if self._config.dtype == "auto" and not agreement.suffices:
            log.warning("%s: %s %s; using float32", self._config.name, precision, agreement)
            return BuiltModel(self._build_in(torch.float32), "float32", None)
        require_agreement(self._config, agreement, precision)
        return BuiltModel(model, precision, agreement)

    def build_unchecked(self, precision: str) -> EncoderModel:
        """Build the model in any precision without measuring its agreement.

        Raises:
            ConfigError: The precision is not available here.
        """
        if precision == "int8":
            return self._build_quantized(self._observe())
        return self._build_in(getattr(torch, precision))

    def _build_in(self, dtype: torch.dtype) -> EncoderModel:
        if self._packs_on_cpu:
            return self._pack(Arithmetic.plain(dtype))
        network = self._network
        if dtype != torch.float32:
            if self._supported:
                return VarlenBert(network, Arithmetic.plain(dtype), self._pooling)
            network = copy.deepcopy(network).to(dtype)
        tokenizer = self._tokenizer
        return TransformersModel(
            network, tokenizer.pad_id, self._pooling, tokenizer.mask_id, tokenizer.max_tokens
        )

    def _pack(self, arithmetic: Arithmetic) -> PackedBert:
        return PackedBert(self._network, arithmetic, self._pooling)

    def _build_quantized(self, observer: RangeObserver) -> EncoderModel:
        try:
            return self._pack(quantized_arithmetic(observer.ranges))
        except (AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"classifiers.{self._config.name}.dtype: int8 is not available on this machine: "
                f"{error}"
            ) from error

    def _observe(self) -> RangeObserver:
        """Run the check texts through a float32 model that records its activations."""
        if not self._packs_on_cpu:
            raise ConfigError(
                f"classifiers.{self._config.name}.dtype: int8 is for BERT on the CPU; "
                f"this is {type(self._network).__name__} on {self._network.device.type}"
            )
        observer = RangeObserver()
        model = self._pack(observed_arithmetic(observer))
        for head in self._heads:
            for batch in batches_by_length(self._check_ids(head)):
                model.run(head, batch)
        return observer

    def _agreement(self, model: EncoderModel, precision: str) -> Agreement:
        settings = precision, self._network.device.type, self._config.tasks, self._pooling
        store = AgreementStore(self._path, *settings)
        if (known := store.read()) is not None:
            return known
        full = self._build_in(torch.float32)
        problem = self._network.config.problem_type
        agreements = [
            measure_agreement(head, model.run, full.run, self._check_ids(head), problem)
            for head in self._heads
        ]
        worst = min(agreements, key=lambda agreement: agreement.share)
        store.write(worst)
        return worst

    def _check_ids(self, head: ClassifierTask) -> list[TokenIds]:
        single = check_texts(self._path)
        texts: list[Text] = [*single]
        if head == "classify" and PAIR_TASKS & set(self._config.tasks):
            # Alternately a text with itself and with another one, for high and low scores.
            texts = [(text, single[i - i % 2]) for i, text in enumerate(single)]
        ids = self._tokenizer.encode(texts, 0, "right")
        if head == "fill-mask":
            for row in ids:
                row[len(row) // 2] = self._tokenizer.mask_id
        return ids
