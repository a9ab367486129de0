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

from cluster.config import TASK_HEADS, ClassifierConfig
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
from cluster.engines.classifier.model.packed.quantize import RangeObserver, quantized_arithmetic
from cluster.engines.classifier.model.padded import TransformersModel
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import EncoderModel, Head, Text, TokenIds
from cluster.errors import ConfigError

log = logging.getLogger(__name__)

PAIR_TASKS = {"score", "rerank", "next-sentence"}
"""Tasks whose inputs are pairs of texts."""
_HEADS: Mapping[str | None, Head] = {
    "ForSequenceClassification": "classify",
    "ForNextSentencePrediction": "classify",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    None: "embed",
}
"""Head to compute by the suffix of the architecture's name."""


def computed_heads(config: ClassifierConfig) -> tuple[Head, ...]:
    """Return the distinct heads that the configured tasks make the model compute."""
    return tuple(dict.fromkeys(_HEADS[TASK_HEADS[task]] for task in config.tasks))


@dataclass(frozen=True, slots=True)
class ModelBuilder:
    """Builder of models of one network."""

    config: ClassifierConfig
    path: str
    """The model's directory."""
    network: Any
    """The float32 network on its device."""
    tokenizer: TextTokenizer
    pooling: Pooling

    def build(self) -> tuple[EncoderModel, Agreement | None]:
        """Return the model in the configured precision, and its agreement if that is not float32.

        With dtype ``auto``, fall back to float32 if the agreement is too low.

        Raises:
            ConfigError: The precision is not available here, or does not agree with float32.
        """
        name, agreement = self.config.name, None
        precision = choose_precision(self.config, self.network.device)
        model = self.build_unchecked(precision)
        if precision != "float32":
            agreement = self._agreement(model, precision)
            if self.config.dtype == "auto" and not agreement.suffices:
                log.warning("%s: %s %s; using float32", name, precision, agreement)
                model, agreement, precision = self._build_in(torch.float32), None, "float32"
            else:
                require_agreement(self.config, agreement, precision)
        if isinstance(model, VarlenBert):
            model.prepare(computed_heads(self.config), self.config.max_batch_tokens)
        kind, device = type(model).__name__, self.network.device
        log.info("%s: loaded %s in %s on %s", name, kind, precision, device)
        return model, agreement

    def build_unchecked(self, precision: str) -> EncoderModel:
        """Build the model in any precision without measuring its agreement.

        Raises:
            ConfigError: The precision is not available here.
        """
        if precision != "int8":
            return self._build_in(getattr(torch, precision))
        ranges = self._observe().ranges
        try:
            return self._pack(quantized_arithmetic(ranges))
        except (AttributeError, RuntimeError) as error:
            field = f"classifiers.{self.config.name}.dtype"
            message = f"{field}: int8 is not available on this machine: {error}"
            raise ConfigError(message) from error

    @property
    def _packs_on_cpu(self) -> bool:
        return supports(self.network) and self.network.device.type == "cpu"

    def _build_in(self, dtype: torch.dtype) -> EncoderModel:
        if self._packs_on_cpu:
            return self._pack(Arithmetic.plain(dtype))
        network = self.network
        if dtype != torch.float32:
            if supports(network):
                return VarlenBert(network, Arithmetic.plain(dtype), self.pooling)
            network = copy.deepcopy(network).to(dtype)
        tokenizer = self.tokenizer
        return TransformersModel(
            network, tokenizer.pad_id, self.pooling, tokenizer.mask_id, tokenizer.max_tokens
        )

    def _pack(self, arithmetic: Arithmetic) -> PackedBert:
        return PackedBert(self.network, arithmetic, self.pooling)

    def _observe(self) -> RangeObserver:
        """Run the check texts through a float32 model that records its activations."""
        if not self._packs_on_cpu:
            raise ConfigError(
                f"classifiers.{self.config.name}.dtype: int8 is for BERT on the CPU; "
                f"this is {type(self.network).__name__} on {self.network.device.type}"
            )
        observer = RangeObserver()
        model = self._pack(Arithmetic(torch.float32, torch.float32, observer))
        for head in computed_heads(self.config):
            for batch in batches_by_length(self._check_ids(head)):
                model.run(head, batch)
        return observer

    def _agreement(self, model: EncoderModel, precision: str) -> Agreement:
        settings = precision, self.network.device.type, self.config.tasks, self.pooling
        store = AgreementStore(self.path, *settings)
        if (known := store.read()) is not None:
            return known
        full = self._build_in(torch.float32)
        problem = self.network.config.problem_type
        agreements = [
            measure_agreement(head, model.run, full.run, self._check_ids(head), problem)
            for head in computed_heads(self.config)
        ]
        worst = min(agreements, key=lambda agreement: agreement.share)
        store.write(worst)
        return worst

    def _check_ids(self, head: Head) -> list[TokenIds]:
        single = check_texts(self.path)
        texts: list[Text] = [*single]
        if head == "classify" and PAIR_TASKS & set(self.config.tasks):
            # Alternately a text with itself and with another one, for high and low scores.
            texts = [(text, single[i - i % 2]) for i, text in enumerate(single)]
        ids = self.tokenizer.encode(texts, 0, "right")
        if head == "fill-mask":
            for row in ids:
                row[len(row) // 2] = self.tokenizer.mask_id
        return ids
