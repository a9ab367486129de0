"""Loading an encoder, and its plain forward pass through transformers.

Everything here runs on the model thread. A model takes the token ids of some texts and gives one
row for each; it owns its weights and knows nothing of requests.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from cluster.batching import group_by_length
from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.encoder.build import Builder
from cluster.engines.encoder.device import choose_device
from cluster.engines.encoder.jobs import Rows, TokenIds
from cluster.engines.encoder.precision import Agreement
from cluster.engines.encoder.scores import mean_pool, to_scores
from cluster.engines.encoder.tokenizer import TextTokenizer
from cluster.errors import ConfigError

log = logging.getLogger(__name__)

MAX_PADDING = 0.05
"""Share of padding in one padded forward; a smaller one makes more and smaller forwards."""
UNLIMITED_TOKENS = 1_000_000
"""Tokenizers without a length of their own say 1e30."""


class EncoderModel(Protocol):
    """One forward pass over the texts of a batch."""

    padding: float
    """What was computed of no token since the beginning, as the number of tokens it would make."""

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """Scores [texts, labels] or unit vectors [texts, hidden], in the order of ``ids``.

        ``ids`` are in ascending order of length. A row depends on its text alone, up to rounding.
        """


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what its callers must know of it."""

    model: EncoderModel
    tokenizer: TextTokenizer
    labels: tuple[str, ...]
    """By column of the scores; empty if the model does not classify."""
    vocab_size: int
    hidden_size: int
    shares_cores: bool = True
    """Whether several threads may each run a copy: on a CPU; a GPU is kept busy by one."""
    agreement: Agreement | None = None
    """Of low precision with float32."""


def load_model(config: ClassifierConfig, path: str) -> LoadedModel:
    """Load the model directory ``path``; takes seconds and blocks.

    Raises:
        ConfigError: there is no such model, or it cannot do the configured tasks.
    """
    device = choose_device(config)
    try:
        hf_config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        network = _load_network(config, path, hf_config).to(device).float().eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"classifiers.{config.name}: cannot load {path}: {error}") from error
    texts = TextTokenizer(tokenizer, max_tokens_of(network, tokenizer))
    pad_id = tokenizer.pad_token_id or 0
    built = Builder(config, path, network, texts, lambda n: TransformersModel(n, pad_id)).build()
    kind = type(built.model).__name__
    log.info("%s: %s in %s on %s", config.name, kind, built.precision, device)
    classifies = "classify" in config.tasks
    labels = tuple(str(hf_config.id2label[i]) for i in range(hf_config.num_labels))
    return LoadedModel(
        model=built.model,
        tokenizer=texts,
        labels=labels if classifies else (),
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        shares_cores=device.type == "cpu",
        agreement=built.agreement,
    )


def _load_network(config: ClassifierConfig, path: str, hf_config: Any) -> Any:
    transformers_logging.disable_progress_bar()
    if "classify" not in config.tasks:
        return AutoModel.from_pretrained(path, use_safetensors=True)
    architectures = hf_config.architectures or ["none"]
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(
            f"the task classify needs a *ForSequenceClassification; this is {architectures[0]}"
        )
    return AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)


def max_tokens_of(network: Any, tokenizer: Any) -> int:
    """The longest text that both the tokenizer and the position embeddings take."""
    positions = getattr(network.config, "max_position_embeddings", None) or UNLIMITED_TOKENS
    embeddings = getattr(network.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    if padding_idx is not None:  # RoBERTa counts its positions from padding_idx + 1
        positions -= padding_idx + 1
    return int(min(tokenizer.model_max_length, positions, UNLIMITED_TOKENS))


class TransformersModel:
    """Any architecture, through its own forward, padded in groups of like length.

    Args:
        network: A ``*ForSequenceClassification``, or an encoder if it need only embed.
        pad_id: The id that padding cells hold.
    """

    def __init__(self, network: Any, pad_id: int) -> None:
        self._network = network
        self._pad_id = pad_id
        self.padding = 0.0

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        """See ``EncoderModel``."""
        groups = group_by_length([len(row) for row in ids], MAX_PADDING)
        rows = [self._run_padded(task, ids[group]) for group in groups]
        return np.concatenate(rows)

    @torch.inference_mode()
    def _run_padded(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows:
        padded, mask = self._pad(ids)
        if task == "classify":
            logits = self._network(input_ids=padded, attention_mask=mask).logits
            rows = to_scores(logits.float(), self._network.config)
        else:
            encoder = self._network.base_model
            hidden = encoder(input_ids=padded, attention_mask=mask).last_hidden_state
            rows = mean_pool(hidden, mask)
        return np.asarray(rows.cpu().numpy(), np.float32)

    def _pad(self, ids: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
        cells = np.full((len(ids), len(ids[-1])), self._pad_id, np.int64)
        mask = np.zeros(cells.shape, np.int64)
        for row, text in enumerate(ids):
            cells[row, : len(text)] = text
            mask[row, : len(text)] = 1
        self.padding += cells.size - int(mask.sum())
        device = self._network.device
        return torch.from_numpy(cells).to(device), torch.from_numpy(mask).to(device)
