"""Inputs of a fine-tuning: options, labels, and the split of the texts. Loads no torch."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.models.data_file import BadLines, DataRow, plain_integer

MIN_TEXTS = 10  # distinct texts; fewer can neither train a model nor measure it


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """Options of a fine-tuning; the defaults suit MiniLM-L6 and about 10,000 short texts."""

    label_names: tuple[str, ...]
    """Labels in the order of their ids."""
    base_name: str = ""
    """Name of the base model in the model card; empty: the name of its directory."""
    epochs: int = 1
    """Maximum number of passes over the training texts."""
    patience: int = 0
    """Epochs without a lower validation loss before training stops; 0: no early stop."""
    batch_size: int = 32
    max_tokens: int = 48
    """Length in tokens to which texts are truncated."""
    learning_rate: float = 3e-4
    head_learning_rate: float = 1e-3
    frozen_layers: int = 4
    """Number of lowest encoder layers that are not trained; word embeddings never are."""
    teacher: Path | None = None
    """Classifier with the same labels whose scores are imitated; None: only the labels count."""
    keep_embeddings: float = 2.0
    """Loss weight of the cosine distance to the base's mean-pooled embeddings; 0: none."""
    anchor_steps: int = 1
    """Steps from one comparison with the base's embeddings to the next."""
    max_train_texts: int | None = None
    """Maximum number of training texts; None: all."""
    max_train_chars: int | None = None
    """Length in characters up to which texts are used for training; None: any."""
    dropout: bool = True
    """Apply the model's dropout in the trained layers."""
    bfloat16: bool = False
    """Compute in bfloat16 if the machine does so natively; weights stay float32."""
    held_out: float = 0.1
    """Share of the texts for the final measurement. With early stopping, the same share again is
    for validation."""
    seed: int = 0
    threads: int | None = None
    """Compute threads; None: PyTorch's default."""


@dataclass(frozen=True, slots=True)
class Split:
    """Shuffled texts with label ids; no text is in two parts."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    """Texts for early stopping; empty without it."""
    held_out: list[tuple[str, int]]
    """Texts for the final measurement only."""


def label_names(path: Path, rows: Sequence[DataRow]) -> tuple[str, ...]:
    """Return the distinct labels in the order of their ids: numerically, or else by name.

    Raises:
        DataError: there are fewer than two labels.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        found = f"all {len(rows)} rows have the label {min(names)!r}" if names else "no rows"
        raise DataError(f"{path}: {found}; at least two labels are required")
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def similar_labels(rows: Sequence[DataRow]) -> list[dict[str, int]]:
    """Return the groups of labels that differ only in case or spaces, with their row counts."""
    groups: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for label, count in Counter(row.label for row in rows).items():
        groups[_fold(label)][label] = count
    return [group for group in groups.values() if len(group) > 1]


def label_ids(path: Path, rows: Sequence[DataRow], names: Sequence[str]) -> NDArray[np.int64]:
    """Return each row's label as its index in ``names``.

    Raises:
        DataError: labels are not in ``names``; the message names their lines.
    """
    ids = {plain_integer(name): i for i, name in enumerate(names)}
    ids |= {name: i for i, name in enumerate(names)}
    by_folded = {_fold(name): name for name in names}
    bad_lines = BadLines(path)
    for row in rows:
        if row.label not in ids:
            similar = by_folded.get(_fold(row.label))
            hint = f"; did you mean {similar!r}?" if similar else ""
            known = ", ".join(names)
            bad_lines.add(row.line, f"unknown label {row.label!r}; allowed: {known}{hint}")
    bad_lines.raise_if_any()
    return np.array([ids[row.label] for row in rows], np.int64)


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def split(
    texts: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
    held_out: float,
    validation: float = 0.0,
    seed: int = 0,
) -> Split:
    """Split texts into parts, with the same shares of every label.

    Duplicates (up to case and white space) count once, with their first label.

    Raises:
        DataError: a label is unknown, or has too few texts for all parts.
    """
    by_label = _unique_by_label(texts, labels, names)
    shares = [held_out, validation] if validation else [held_out]
    parts: list[list[tuple[str, int]]] = [[], [], []]
    rng = random.Random(seed)
    for label, members in enumerate(by_label):
        rng.shuffle(members)
        start = 0
        for part, share in enumerate(shares):
            stop = start + max(1, round(len(members) * share))
            parts[part] += [(text, label) for text in members[start:stop]]
            start = stop
        parts[2] += [(text, label) for text in members[start:]]
        if start >= len(members):
            raise DataError(
                f"label {names[label]!r} has {len(members)} distinct texts; "
                f"at least {start + 1} are required"
            )
    for part_rows in parts:
        rng.shuffle(part_rows)
    return Split(train=parts[2], validation=parts[1], held_out=parts[0])


def _unique_by_label(
    texts: Sequence[str], labels: Sequence[str], names: Sequence[str]
) -> list[list[str]]:
    if len(texts) != len(labels):
        raise DataError(f"got {len(labels)} labels for {len(texts)} texts")
    ids = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(labels) - ids.keys()):
        raise DataError(f"unknown label {unknown[0]!r}; allowed: {', '.join(ids)}")
    unique: dict[str, tuple[str, str]] = {}
    for text, label in zip(texts, labels, strict=True):
        unique.setdefault(_fold(text), (text, label))
    if len(unique) < MIN_TEXTS:
        raise DataError(f"got {len(unique)} distinct texts; at least {MIN_TEXTS} are required")
    by_label: list[list[str]] = [[] for _ in names]
    for text, label in unique.values():
        by_label[ids[label]].append(text)
    return by_label
