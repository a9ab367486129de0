"""Loading of a model directory: the network with the head that the tasks need.

Runs on the model thread.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cluster.config import TASK_HEADS, ClassifierConfig
from cluster.engines.classifier.model.agreement import Agreement
from cluster.engines.classifier.model.build import ModelBuilder
from cluster.engines.classifier.model.device import choose_device
from cluster.engines.classifier.model.outputs import Pooling, apply_calibration, read_pooling
from cluster.engines.classifier.model.tokenizer import TextTokenizer
from cluster.engines.classifier.model.types import EncoderModel
from cluster.errors import ConfigError
from cluster.models.predict import max_tokens_of

LABELLED = ("ForSequenceClassification", "ForTokenClassification")
"""Heads whose scores have labels."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with the properties that its callers need."""

    model: EncoderModel
    tokenizer: TextTokenizer
    labels: tuple[str, ...]
    """Label of each column of the scores; empty if the model does not classify."""
    vocab_size: int
    hidden_size: int
    pooling: Pooling
    shares_cores: bool = True
    """True on a CPU: several threads compute at once, each with a copy of the model and its share
    of the cores. A GPU computes one batch after the other."""
    agreement: Agreement | None = None
    """Agreement of low precision with float32; None for float32."""

    @property
    def embedding_size(self) -> int:
        return self.hidden_size * len(self.pooling.modes)


def load_model(config: ClassifierConfig, path: str) -> LoadedModel:
    """Load the model directory ``path``; takes seconds and blocks.

    Raises:
        ConfigError: There is no such model, it cannot do the configured tasks, or the configured
            precision is not available or does not agree with float32.
    """
    builder = make_builder(config, path)
    model, agreement = builder.build()
    hf_config = builder.network.config
    labels = tuple(str(hf_config.id2label[i]) for i in range(hf_config.num_labels))
    return LoadedModel(
        model=model,
        tokenizer=builder.tokenizer,
        labels=labels if config.head in LABELLED else (),
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        pooling=builder.pooling,
        shares_cores=builder.network.device.type == "cpu",
        agreement=agreement,
    )


def make_builder(config: ClassifierConfig, path: str) -> ModelBuilder:
    """Load the network in float32; the builder makes models in any precision.

    Raises:
        ConfigError: There is no such model, or it cannot do the configured tasks.
    """
    device = choose_device(config)
    try:
        hf_config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        network = _load_network(config, path, hf_config).to(device).float().eval()
        _check_vocabulary(network, tokenizer)
        pooling = read_pooling(path) if "embed" in config.tasks else Pooling()
    except (OSError, ValueError) as error:
        raise ConfigError(f"classifiers.{config.name}: cannot load {path}: {error}") from error
    apply_calibration(network.config, Path(path))
    max_tokens = max_tokens_of(network, tokenizer)
    texts = TextTokenizer(tokenizer, max_tokens, has_token_types(network, tokenizer))
    return ModelBuilder(config, path, network, texts, pooling)


def _load_network(config: ClassifierConfig, path: str, hf_config: Any) -> Any:
    transformers_logging.disable_progress_bar()
    _check_tasks(config, hf_config)
    auto = getattr(transformers, f"AutoModel{config.head or ''}")
    network, info = auto.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    if config.head and info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"the weights lack {missing}, and a random head gives random answers")
    return network


def _check_tasks(config: ClassifierConfig, hf_config: Any) -> None:
    if config.head is None:
        return
    architecture = (hf_config.architectures or ["none"])[0]
    if not architecture.endswith(config.head):
        possible = [task for task, head in TASK_HEADS.items() if architecture.endswith(head or "")]
        raise ValueError(
            f"the task {config.tasks[0]} needs a *{config.head}; this is a {architecture}, "
            f"whose tasks are {', '.join(possible)}"
        )
    if hf_config.num_labels != 1 and {"score", "rerank"} & set(config.tasks):
        raise ValueError(
            f"score and rerank need a single label; the model has {hf_config.num_labels}"
        )


def _check_vocabulary(network: Any, tokenizer: Any) -> None:
    """Raise if the tokenizer has tokens without an embedding; they would crash the model."""
    rows = network.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise ValueError(f"the tokenizer has tokens up to {largest}, the model up to {rows - 1}")


def has_token_types(network: Any, tokenizer: Any) -> bool:
    """Return True if the model distinguishes a text from its pair by token types."""
    makes_types = "token_type_ids" in tokenizer.model_input_names
    return makes_types and getattr(network.config, "type_vocab_size", 0) > 1
