"""A classifier's plain forward pass over many texts, for measuring it. Loads torch.

Knows transformers' own networks alone; the engine that serves has a faster way.
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

from cluster.errors import ConfigError
from cluster.models.quiet import quiet_transformers
from cluster.models.store import Progress

BATCH = 64  # texts of like length
MAX_TOKENS = 512  # of a text; what is longer is cut
UNLIMITED_TOKENS = 1_000_000
"""Tokenizers without a length of their own say 1e30."""
SINGLE_LABEL = (None, "single_label_classification")  # problem types


@dataclass(frozen=True, slots=True)
class Forward:
    """One batch of texts that went through a network."""

    indices: list[int]
    """Where its texts stand among all."""
    mask: Tensor
    """[texts, longest], 1 where a token is."""
    logits: Tensor
    """[texts, labels]"""


@torch.no_grad()
def forwards(network: Any, tokenizer: Any, ids: Sequence[Sequence[int]]) -> Iterator[Forward]:
    """Run ``ids`` through a network, texts of like length together."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    network.eval()
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        batch = tokenizer.pad({"input_ids": [list(ids[i]) for i in indices]}, return_tensors="pt")
        inputs, mask = batch["input_ids"].to(network.device), batch["attention_mask"]
        mask = mask.to(network.device)
        logits = network(input_ids=inputs, attention_mask=mask).logits
        yield Forward(indices, mask, logits.float())


class Classifier:
    """A model directory that gives each text one label of several.

    Use ``load`` to make one.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network = network
        self._tokenizer = tokenizer
        config = network.config
        self.names: tuple[str, ...] = tuple(config.id2label[i] for i in range(config.num_labels))

    @classmethod
    def load(cls, directory: Path) -> "Classifier":
        """Load it in float32.

        Raises:
            ConfigError: there is no such classifier in safetensors.
        """
        try:
            with quiet_transformers():
                network = AutoModelForSequenceClassification.from_pretrained(
                    directory, dtype=torch.float32, use_safetensors=True
                )
                tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory}: not a classifier to load: {error}") from None
        if network.config.problem_type not in SINGLE_LABEL or network.config.num_labels < 2:
            raise ConfigError(f"{directory}: it does not give one label of several to a text")
        return cls(network, tokenizer)

    def logits(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float64]:
        """[texts, labels]; long texts are cut."""
        cut = max_tokens(self._network, self._tokenizer)
        ids = self._tokenizer(list(texts), truncation=True, max_length=cut)["input_ids"]
        rows = np.empty((len(texts), len(self.names)))
        done = 0
        for batch in forwards(self._network, self._tokenizer, ids):
            rows[batch.indices] = batch.logits.cpu().numpy()
            done += len(batch.indices)
            progress("classifying the texts", done / len(texts))
        return rows


def max_tokens(network: Any, tokenizer: Any) -> int:
    """The longest text that is read whole."""
    return min(MAX_TOKENS, max_tokens_of(network, tokenizer))


def max_tokens_of(network: Any, tokenizer: Any) -> int:
    """The longest text that both the tokenizer and the position embeddings take."""
    positions = getattr(network.config, "max_position_embeddings", None) or UNLIMITED_TOKENS
    embeddings = getattr(network.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    if padding_idx is not None:  # RoBERTa counts its positions from padding_idx + 1
        positions -= padding_idx + 1
    return int(min(tokenizer.model_max_length, positions, UNLIMITED_TOKENS))


@contextmanager
def compute_threads(count: int | None) -> Iterator[None]:
    """torch's threads inside, and what they were outside; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
