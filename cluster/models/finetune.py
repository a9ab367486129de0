"""Fine-tuning of an encoder into a classifier of texts: the whole way from texts to a directory.

The default classifier and a user's own are made here alike. The directory holds the model in
safetensors, its tokenizer, a card (README.md), a picture of what it confuses, and the reference
that drift is measured against. Knows nothing of files of texts or of the model store. Loads torch.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from cluster.errors import ConfigError
from cluster.models import finetune_report as report
from cluster.models.calibration import softmax
from cluster.models.finetune_data import Split, split
from cluster.models.finetune_options import FinetuneOptions
from cluster.models.finetune_trainer import Anchor, FinetuneTrainer, make_trainer, part
from cluster.models.predict import compute_threads, forwards, max_tokens
from cluster.models.quiet import quiet_transformers
from cluster.models.reference import MIN_TEXTS, Reference
from cluster.models.store import Progress


@dataclass(frozen=True, slots=True)
class FinetuneMetrics:
    """What came out, measured on the held-out texts."""

    accuracy: float
    macro_f1: float
    embedding_similarity: float | None
    """Mean cosine of the new and the base's mean-pooled embedding of the same text; None where
    they were free to drift."""
    num_train: int
    num_held_out: int
    epochs: int
    """Those that were run."""
    train_s: float


def finetune(
    texts: Sequence[str],
    labels: Sequence[str],
    base: Path,
    out: Path,
    options: FinetuneOptions,
    progress: Progress,
) -> FinetuneMetrics:
    """Train a classifier of ``texts`` on top of the encoder in ``base`` and save it to ``out``.

    Each text counts once, with its first label, so none stands on both sides of the split. The
    same input gives the same model on the same machine.

    Args:
        texts: The texts, in any order.
        labels: For each text one of ``options.label_names``.
        base: A model directory of an encoder with its tokenizer.
        out: A directory that exists.
        options: How to train.
        progress: Called often, with the share of the training that is done.

    Raises:
        DataError: the labels do not fit the texts, or there are too few of either.
        ConfigError: the base cannot be fine-tuned.
    """
    validation = options.held_out if options.patience else 0.0
    parts = split(texts, labels, options.label_names, options.held_out, validation, options.seed)
    with (
        quiet_transformers(),
        compute_threads(options.threads),
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix="tandem-finetune-") as scratch,
    ):
        torch.manual_seed(options.seed)
        progress("reading the encoder", None)
        network, tokenizer = _load(base, options)
        run = _Run(network, tokenizer, options, scratch)
        run.train(parts, progress)
        progress("measuring the accuracy", None)
        metrics = run.measure(parts, out)
        network.save_pretrained(out)
        _save_tokenizer(tokenizer, out)
        card = report.Card(options.base_name or base.name, options, len(parts.train))
        report.write_card(out, card, run.confusion)
    return metrics


class _Run:
    """One fine-tuning: the network, how it is trained, and how it is measured."""

    def __init__(
        self, network: Any, tokenizer: Any, options: FinetuneOptions, scratch: str
    ) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._options = options
        self._scratch = scratch
        self._parts = part(network, options.frozen_layers)
        self._anchor = Anchor(self._parts.tuned) if options.keep_embeddings else None
        self._trainer: FinetuneTrainer
        self._train_s = 0.0
        self.confusion: NDArray[np.int64]

    def train(self, parts: Split, progress: Progress) -> None:
        started = time.monotonic()
        data = self._examples(parts.train), self._examples(parts.validation)
        collator = DataCollatorWithPadding(self._tokenizer)
        self._trainer = make_trainer(
            self._network, self._parts, data, collator, self._options, self._scratch
        )
        self._trainer.anchor = self._anchor
        self._trainer.report_to(progress)
        self._trainer.train()
        self._train_s = time.monotonic() - started

    def measure(self, parts: Split, out: Path) -> FinetuneMetrics:
        """Measure on the held-out texts, and write what is measured there to ``out``."""
        logits, similarity = self._predict([text for text, _ in parts.held_out])
        truth = np.array([label for _, label in parts.held_out])
        names = self._options.label_names
        self.confusion = report.confusion_matrix(truth, logits.argmax(1), len(names))
        report.draw_confusion(self.confusion, names, out / report.PICTURE)
        self._write_reference(parts, logits, out)
        return FinetuneMetrics(
            accuracy=round(report.accuracy(self.confusion), 4),
            macro_f1=round(report.macro_f1(self.confusion), 4),
            embedding_similarity=None if similarity is None else round(similarity, 4),
            num_train=len(parts.train),
            num_held_out=len(parts.held_out),
            epochs=round(self._trainer.state.epoch or 0),
            train_s=round(self._train_s, 1),
        )

    def _write_reference(self, parts: Split, held_out: NDArray[np.float64], out: Path) -> None:
        """Texts that were trained on would look surer than any that come later."""
        texts = [text for text, _ in parts.held_out]
        if len(texts) >= MIN_TEXTS:
            names = self._options.label_names
            Reference.of(softmax(held_out), list(map(len, texts)), names).write(out)

    def _predict(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], float | None]:
        """Logits, [texts, labels], and the mean similarity of the embeddings to the base's."""
        logits = np.empty((len(texts), len(self._options.label_names)))
        similarity = 0.0
        for batch in forwards(self._network, self._tokenizer, self._ids(texts)):
            logits[batch.indices] = batch.logits.cpu().numpy()
            if self._anchor is not None:
                similarity += float(self._anchor.similarity(batch.mask).sum())
        return logits, None if self._anchor is None else similarity / len(texts)

    def _examples(self, rows: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
        ids = self._ids([text for text, _ in rows]) if rows else []
        return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        cut = min(self._options.max_tokens, max_tokens(self._network, self._tokenizer))
        ids = self._tokenizer(list(texts), truncation=True, max_length=cut)["input_ids"]
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
            ignore_mismatched_sizes=True,  # the head of another classifier
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base}: no encoder that can be fine-tuned: {error}") from None
    network.config.problem_type = "single_label_classification"
    return network, tokenizer


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    # It would keep the cut that training made, and whoever reads tokenizer.json would make it too.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)
