"""Distillation of a classifier into one with fewer layers, by the fine-tuning's trainer.

The student starts with evenly spaced layers of its teacher and learns from the labels and the
teacher's scores. Loads torch.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.errors import ConfigError
from cluster.models.finetune import finetune
from cluster.models.finetune_data import FinetuneOptions, split
from cluster.models.finetune_trainer import layer_stack
from cluster.models.predict import Classifier, compute_threads, quiet_transformers
from cluster.models.store import Progress

NUM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class DistillMetrics:
    """Student and teacher on the same held-out texts, in float32."""

    layers: int
    teacher_layers: int
    accuracy: float
    teacher_accuracy: float
    agreement: float
    """Share of held-out texts to which both give the same label."""
    texts_per_s: float
    teacher_texts_per_s: float
    """Medians over rounds that alternate between both."""
    num_train: int
    num_held_out: int


def kept_layers(count: int, kept: int) -> list[int]:
    """Return evenly spaced layers, the last one included: its output suits the head.

    Raises:
        ConfigError: the student would not be smaller.
    """
    if not 1 <= kept < count:
        raise ConfigError(f"layers: got {kept}; the model has {count}, so 1 to {count - 1} remain")
    return [round((index + 1) * count / kept) - 1 for index in range(kept)]


def distill(
    texts: Sequence[str],
    labels: Sequence[str],
    teacher: Path,
    out: Path,
    layers: int,
    options: FinetuneOptions,
    progress: Progress,
) -> DistillMetrics:
    """Train a student with ``layers`` layers and save it to ``out``.

    ``options.label_names`` must be the teacher's.

    Raises:
        DataError: a label is unknown, or there are too few texts.
        ConfigError: the teacher has no more layers than the student.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-distill-") as scratch:
        start = Path(scratch)
        num_layers = _write_student(teacher, start, layers)
        options = replace(options, teacher=teacher)
        trained = finetune(texts, labels, start, out, options, progress)
    validation = options.held_out if options.patience else 0.0
    held_out = split(
        texts, labels, options.label_names, options.held_out, validation, options.seed
    ).held_out
    rows, truth = zip(*held_out, strict=True)
    with compute_threads(options.threads):
        both = Classifier.load(out), Classifier.load(teacher)
        rates: tuple[list[float], list[float]] = [], []
        for index in range(NUM_ROUNDS):
            progress("measuring the rate", index / NUM_ROUNDS)
            found = []
            for one, rate in zip(both, rates, strict=True):
                started = time.perf_counter()
                found.append(one.logits(rows, lambda message, fraction: None).argmax(1))
                rate.append(len(rows) / (time.perf_counter() - started))
    return DistillMetrics(
        layers=layers,
        teacher_layers=num_layers,
        accuracy=trained.accuracy,
        teacher_accuracy=round(float(np.mean(found[1] == np.array(truth))), 4),
        agreement=round(float(np.mean(found[0] == found[1])), 4),
        texts_per_s=round(statistics.median(rates[0]), 1),
        teacher_texts_per_s=round(statistics.median(rates[1]), 1),
        num_train=trained.num_train,
        num_held_out=trained.num_held_out,
    )


def _write_student(teacher: Path, start: Path, layers: int) -> int:
    """Write the untrained student; return the teacher's number of layers."""
    classifier = Classifier.load(teacher)
    with quiet_transformers():
        stack = layer_stack(classifier.network)
        count = len(stack)
        kept = kept_layers(count, layers)
        for index in reversed(range(count)):
            if index not in kept:
                del stack[index]
        classifier.network.config.num_hidden_layers = layers
        classifier.network.save_pretrained(start)
        classifier.tokenizer.save_pretrained(start)
    return count
