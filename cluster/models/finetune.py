"""Fine-tuning of an encoder into a text classifier.

It makes both the default classifier and the users' own. The resulting directory has the model in
safetensors, its tokenizer, a model card (README.md) with a confusion matrix, and the reference for
drift detection. Loads torch.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from cluster.errors import ConfigError
from cluster.models import finetune_report as report
from cluster.models.calibration import softmax
from cluster.models.finetune_data import FinetuneOptions, Split, split
from cluster.models.finetune_trainer import (
    EmbeddingAnchor,
    FinetuneTrainer,
    ProgressCallback,
    freeze_layers,
    make_trainer,
    mixed_precision,
)
from cluster.models.predict import (
    MAX_TOKENS,
    compute_threads,
    max_tokens_of,
    quiet_transformers,
    run_batches,
)
from cluster.models.reference import MIN_TEXTS, Reference
from cluster.models.store import Progress


@dataclass(frozen=True, slots=True)
class FinetuneMetrics:
    """Metrics on the held-out texts."""

    accuracy: float
    macro_f1: float
    embedding_similarity: float | None
    """Mean cosine similarity of mean-pooled embeddings to the base's; None if the loss did not
    preserve them."""
    num_train: int
    num_held_out: int
    epochs: int
    """Number of completed epochs."""
    train_s: float


def finetune(
    texts: Sequence[str],
    labels: Sequence[str],
    base: Path,
    out: Path,
    options: FinetuneOptions,
    progress: Progress,
) -> FinetuneMetrics:
    """Fine-tune the encoder in ``base`` to classify texts, and save the model to ``out``.

    Duplicate texts count once, so none is in both parts of the split. The result is deterministic
    on the same machine.

    Raises:
        DataError: a label is unknown, or there are too few texts.
        ConfigError: the base cannot be fine-tuned.
    """
    validation = options.held_out if options.patience else 0.0
    parts = split(texts, labels, options.label_names, options.held_out, validation, options.seed)
    limit = options.max_train_chars
    train = [row for row in parts.train if limit is None or len(row[0]) <= limit]
    parts = replace(parts, train=train[: options.max_train_texts])
    with (
        quiet_transformers(),
        compute_threads(options.threads),
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix="tandem-finetune-") as scratch,
    ):
        torch.manual_seed(options.seed)
        progress("reading the encoder", None)
        network, tokenizer = _load(base, options)
        run = _Run(network, tokenizer, options)
        run.train(parts, scratch, progress)
        progress("measuring the accuracy", None)
        metrics = run.measure(parts, out)
        network.save_pretrained(out)
        _save_tokenizer(tokenizer, out)
        base_name = options.base_name or base.name
        report.write_card(out, base_name, options, len(parts.train), run.confusion)
    return metrics


class _Run:
    def __init__(self, network: Any, tokenizer: Any, options: FinetuneOptions) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._options = options
        self._anchor: EmbeddingAnchor | None = None
        self._trainer: FinetuneTrainer
        self._train_s = 0.0
        self.confusion: NDArray[np.int64]

    def train(self, parts: Split, scratch: str, progress: Progress) -> None:
        started = time.monotonic()
        layers = freeze_layers(self._network, self._options.frozen_layers)
        if self._options.keep_embeddings:
            self._anchor = EmbeddingAnchor(layers.tuned)
        data = self._examples(parts.train), self._examples(parts.validation)
        collator = DataCollatorWithPadding(self._tokenizer)
        self._trainer = make_trainer(self._network, layers, data, collator, self._options, scratch)
        self._trainer.anchor = self._anchor
        if self._options.teacher is not None:
            teacher, _ = _load(self._options.teacher, self._options)
            self._trainer.teacher = teacher.to(self._network.device).eval().requires_grad_(False)
        self._trainer.add_callback(ProgressCallback(progress))
        self._trainer.train()
        self._train_s = time.monotonic() - started

    def measure(self, parts: Split, out: Path) -> FinetuneMetrics:
        texts, truth = zip(*parts.held_out, strict=True)
        device = self._network.device.type
        with mixed_precision(device, enabled=self._options.bfloat16):
            logits, similarity = self._predict(texts)
        names = self._options.label_names
        self.confusion = report.confusion_matrix(np.array(truth), logits.argmax(1), len(names))
        report.draw_confusion(self.confusion, names, out / report.PICTURE)
        # Not the training texts, about which the model is more confident.
        if len(texts) >= MIN_TEXTS:
            Reference.from_scores(softmax(logits), list(map(len, texts)), names).write(out)
        return FinetuneMetrics(
            accuracy=round(report.accuracy(self.confusion), 4),
            macro_f1=round(report.macro_f1(self.confusion), 4),
            embedding_similarity=None if similarity is None else round(similarity, 4),
            num_train=len(parts.train),
            num_held_out=len(parts.held_out),
            epochs=round(self._trainer.state.epoch or 0),
            train_s=round(self._train_s, 1),
        )

    def _predict(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], float | None]:
        """Return logits, [texts, labels], and the mean similarity of embeddings to the base's."""
        logits = np.empty((len(texts), len(self._options.label_names)))
        similarity = 0.0
        for batch in run_batches(self._network, self._tokenizer, self._ids(texts)):
            logits[batch.indices] = batch.logits.cpu().numpy()
            if self._anchor is not None:
                similarity += float(self._anchor.similarity(batch.mask).sum())
        return logits, None if self._anchor is None else similarity / len(texts)

    def _examples(self, rows: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        ids = self._ids([text for text, _ in rows]) if rows else []
        return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        limit = min(
            self._options.max_tokens, MAX_TOKENS, max_tokens_of(self._network, self._tokenizer)
        )
        ids = self._tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        assert isinstance(ids, list)
        return ids


def _load(base: Path, options: FinetuneOptions) -> tuple[Any, Any]:
    names = options.label_names
    try:
        network = AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=True,  # base may have another classifier's head
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base}: not an encoder that can be fine-tuned: {error}") from None
    network.config.problem_type = "single_label_classification"
    return network, tokenizer


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    # Otherwise tokenizer.json would keep the truncation set during training.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)
