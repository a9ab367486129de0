"""From a network in float32 to the model that computes batches in the configured precision.

Chooses the fastest way that the architecture, the processor and the configuration allow, and has
low precision prove itself. Runs on the model thread.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.config import TASK_HEADS, ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.check_texts import check_texts
from cluster.engines.classifier.model.device import choose_precision
from cluster.engines.classifier.model.packed import PackedBert
from cluster.engines.classifier.model.packed.linear import Arithmetic
from cluster.engines.classifier.model.packed.quantize import Observer, observed, quantized
from cluster.engines.classifier.model.packed.varlen import VarlenBert
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.model.pooling import Pooling
from cluster.engines.classifier.model.precision import (
    Agreement,
    AgreementStore,
    batches,
    measure,
    require,
)
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import EncoderModel, Text, TokenIds
from cluster.errors import ConfigError

log = logging.getLogger(__name__)

PAIRED = {"score", "rerank", "next-sentence"}
"""Tasks whose inputs are pairs of texts."""
_COMPUTED: Mapping[str | None, ClassifierTask] = {
    "ForSequenceClassification": "classify",
    "ForNextSentencePrediction": "classify",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    None: "embed",
}


def computed(config: ClassifierConfig) -> tuple[ClassifierTask, ...]:
    """What the model is asked to compute for the configured tasks: each task's ``head``, once."""
    return tuple(dict.fromkeys(_COMPUTED[TASK_HEADS[task]] for task in config.tasks))


@dataclass(frozen=True, slots=True)
class Built:
    """The model, and how well it does."""

    model: EncoderModel
    precision: str
    agreement: Agreement | None
    """None: it computes in float32."""


class Builder:
    """Makes models of one network.

    Args:
        config: The pool.
        path: The model's directory.
        network: In float32, on the device.
        tokenizer: The model's.
        pooling: How embeddings are made.
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
        self._heads = computed(config)
        self._packs = PackedBert.supports(network) and network.device.type == "cpu"

    def build(self) -> Built:
        """The model in the configured precision.

        Where ``auto`` chose it and it does not agree with float32, that is taken instead.

        Raises:
            ConfigError: it cannot be had here, or does not agree with float32.
        """
        precision = choose_precision(self._config, self._network.device)
        if precision == "float32":
            return Built(self._in(torch.float32), precision, None)
        model = self.low(precision)
        agreement = self._agreement(model, precision)
        if self._config.dtype == "auto" and not agreement.suffices:
            log.warning("%s: %s, too little; float32 it is", self._config.name, agreement)
            return Built(self._in(torch.float32), "float32", None)
        require(self._config, agreement, precision)
        return Built(model, precision, agreement)

    def low(self, precision: str) -> EncoderModel:
        """The model in a low precision, however well it does.

        Raises:
            ConfigError: it cannot be had here.
        """
        if precision == "int8":
            return self._quantized(self._observe())
        return self._in(getattr(torch, precision))

    def _in(self, dtype: torch.dtype) -> EncoderModel:
        if self._packs:
            return self._packed(Arithmetic.plain(dtype))
        network = self._network
        if dtype != torch.float32:
            if PackedBert.supports(network):
                return VarlenBert(network, Arithmetic.plain(dtype), self._pooling)
            network = copy.deepcopy(network).to(dtype)
        texts = self._tokenizer
        return TransformersModel(
            network, texts.pad_id, self._pooling, texts.mask_id, texts.max_tokens
        )

    def _packed(self, how: Arithmetic) -> PackedBert:
        return PackedBert(self._network, how, self._pooling)

    def _quantized(self, seen: Observer) -> EncoderModel:
        try:
            return self._packed(quantized(seen.seen))
        except (AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"classifiers.{self._config.name}.dtype: int8 cannot be computed here: {error}"
            ) from error

    def _observe(self) -> Observer:
        if not self._packs:
            raise ConfigError(
                f"classifiers.{self._config.name}.dtype: int8 is for BERT on the CPU; "
                f"this is {type(self._network).__name__} on {self._network.device.type}"
            )
        observer = Observer()
        model = self._packed(observed(observer))
        for head in self._heads:
            for batch in batches(self._check_ids(head)):
                model.run(head, batch)
        return observer

    def _agreement(self, model: EncoderModel, precision: str) -> Agreement:
        parts = precision, self._network.device.type, self._config.tasks, self._pooling
        kept = AgreementStore(self._path, *parts)
        if (known := kept.read()) is not None:
            return known
        full = self._in(torch.float32)
        problem = self._network.config.problem_type
        found = [
            measure(head, model.run, full.run, self._check_ids(head), problem)
            for head in self._heads
        ]
        worst = min(found, key=lambda agreement: agreement.share)
        kept.write(worst)
        return worst

    def _check_ids(self, head: ClassifierTask) -> list[TokenIds]:
        single = check_texts(self._path)
        texts: list[Text] = [*single]
        if head == "classify" and PAIRED & set(self._config.tasks):
            # In turn with itself and with another, so that scores are high and low.
            texts = [(text, single[i - i % 2]) for i, text in enumerate(single)]
        ids = self._tokenizer.encode(texts, 0, "right")
        if head == "fill-mask":
            for row in ids:
                row[len(row) // 2] = self._tokenizer.mask_id
        return ids
