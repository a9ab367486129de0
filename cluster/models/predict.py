"""Plain forward pass of a classifier over many texts, for measurements. Loads torch.

It uses transformers' own networks; the serving engine has a faster implementation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from cluster.errors import ConfigError
from cluster.models.store import Progress

BATCH_TEXTS = 64  # texts of similar length
MAX_TOKENS = 512  # longer texts are truncated
UNLIMITED_TOKENS = 1_000_000
"""Stands for no limit; tokenizers without a limit report 1e30."""
SINGLE_LABEL = (None, "single_label_classification")  # problem types


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Result of a batch of texts."""

    indices: list[int]
    """Positions of the texts in the input."""
    mask: Tensor
    """Attention mask, [texts, longest text]; 0 is padding."""
    logits: Tensor
    """Logits, [texts, labels]."""


@torch.no_grad()
def run_batches(
    network: Any, tokenizer: Any, ids: Sequence[Sequence[int]]
) -> Iterator[ForwardBatch]:
    """Run texts (as token ids) through a network in batches of similar length."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    network.eval()
    for start in range(0, len(order), BATCH_TEXTS):
        indices = order[start : start + BATCH_TEXTS]
        batch = tokenizer.pad({"input_ids": [list(ids[i]) for i in indices]}, return_tensors="pt")
        inputs, mask = batch["input_ids"].to(network.device), batch["attention_mask"]
        mask = mask.to(network.device)
        logits = network(input_ids=inputs, attention_mask=mask).logits
        yield ForwardBatch(indices, mask, logits.float())


class Classifier:
    """Loaded single-label classifier; use ``load`` to create one."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        config = network.config
        self.names: tuple[str, ...] = tuple(config.id2label[i] for i in range(config.num_labels))

    @classmethod
    def load(cls, directory: Path) -> "Classifier":
        """Load a model directory in float32.

        Raises:
            ConfigError: the directory has no single-label classifier in safetensors.
        """
        try:
            with quiet_transformers():
                network = AutoModelForSequenceClassification.from_pretrained(
                    directory, dtype=torch.float32, use_safetensors=True
                )
                tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory}: cannot be loaded as a classifier: {error}") from None
        if network.config.problem_type not in SINGLE_LABEL or network.config.num_labels < 2:
            raise ConfigError(
                f"{directory}: not a single-label classifier with at least two labels"
            )
        return cls(network, tokenizer)

    def logits(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float64]:
        """Return logits, [texts, labels]; long texts are truncated."""
        limit = min(MAX_TOKENS, max_tokens_of(self.network, self.tokenizer))
        ids = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        rows = np.empty((len(texts), len(self.names)))
        done = 0
        for batch in run_batches(self.network, self.tokenizer, ids):
            rows[batch.indices] = batch.logits.cpu().numpy()
            done += len(batch.indices)
            progress("classifying the texts", done / len(texts))
        return rows


def max_tokens_of(network: Any, tokenizer: Any) -> int:
    """Return the maximum text length of both tokenizer and position embeddings, in tokens."""
    positions = getattr(network.config, "max_position_embeddings", None) or UNLIMITED_TOKENS
    embeddings = getattr(network.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    if padding_idx is not None:  # RoBERTa numbers positions from padding_idx + 1
        positions -= padding_idx + 1
    return int(min(tokenizer.model_max_length, positions, UNLIMITED_TOKENS))


@contextmanager
def compute_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads within the ``with`` block; None keeps it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings within the ``with`` block."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
