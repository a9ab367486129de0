"""From a network in float32 to the model that computes batches in the configured precision.

Chooses the fastest way that the architecture, the processor and the configuration allow, and has
low precision prove itself. Runs on the model thread.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.encoder.check_texts import check_texts
from cluster.engines.encoder.device import choose_precision
from cluster.engines.encoder.jobs import TokenIds
from cluster.engines.encoder.packed import PackedBert
from cluster.engines.encoder.packed.linear import Arithmetic
from cluster.engines.encoder.packed.quantize import Observer, observed, quantized
from cluster.engines.encoder.packed.varlen import VarlenBert
from cluster.engines.encoder.precision import Agreement, AgreementStore, batches, measure, require
from cluster.engines.encoder.tokenizer import TextTokenizer
from cluster.errors import ConfigError

log = logging.getLogger(__name__)


class Computes(Protocol):
    """The part of ``EncoderModel`` that matters here."""

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds], /) -> Any:
        """See ``EncoderModel``."""


@dataclass(frozen=True, slots=True)
class Built:
    """The model, and how well it does."""

    model: Any
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
        padded: Makes the model that goes through transformers, of a network in some type.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        path: str,
        network: Any,
        tokenizer: TextTokenizer,
        padded: Callable[[Any], Computes],
    ) -> None:
        self._config = config
        self._path = path
        self._network = network
        self._tokenizer = tokenizer
        self._padded = padded
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

    def low(self, precision: str) -> Computes:
        """The model in a low precision, however well it does.

        Raises:
            ConfigError: it cannot be had here.
        """
        if precision == "int8":
            return self._quantized(self._observe())
        return self._in(getattr(torch, precision))

    def _in(self, dtype: torch.dtype) -> Computes:
        if self._packs:
            return PackedBert(self._network, Arithmetic.plain(dtype))
        if PackedBert.supports(self._network) and dtype != torch.float32:
            return VarlenBert(self._network, Arithmetic.plain(dtype))
        if dtype == torch.float32:
            return self._padded(self._network)
        return self._padded(copy.deepcopy(self._network).to(dtype))

    def _quantized(self, seen: Observer) -> Computes:
        try:
            return PackedBert(self._network, quantized(seen.seen))
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
        model = PackedBert(self._network, observed(observer))
        for task in self._config.tasks:
            for batch in batches(self._check_ids()):
                model.run(task, batch)
        return observer

    def _agreement(self, model: Computes, precision: str) -> Agreement:
        kept = AgreementStore(self._path, precision, self._network.device.type, self._config.tasks)
        if (known := kept.read()) is not None:
            return known
        full = self._in(torch.float32)
        ids = self._check_ids()
        found = [measure(task, model.run, full.run, ids) for task in self._config.tasks]
        worst = min(found, key=lambda agreement: agreement.share)
        kept.write(worst)
        return worst

    def _check_ids(self) -> list[TokenIds]:
        return self._tokenizer.encode(check_texts(self._path), 0, truncate=True)
