"""Inputs of a fine-tuning: options, texts and labels from a file, and their split.

Errors name the file and line of a bad row. Loads no torch.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError

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
    keep_embeddings: float = 2.0
    """Loss weight of the cosine distance to the base's mean-pooled embeddings; 0: none."""
    held_out: float = 0.1
    """Share of the texts for the final measurement. With early stopping, the same share again is
    for validation."""
    seed: int = 0
    threads: int | None = None
    """Compute threads; None: PyTorch's default."""


@dataclass(frozen=True, slots=True)
class DataRow:
    """Text of a file, with its label."""

    line: int
    """Line in the file at which the row starts, from 1."""
    text: str
    label: str
    """Empty if no labels are read."""


@dataclass(frozen=True, slots=True)
class Split:
    """Shuffled texts with label ids; no text is in two parts."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    """Texts for early stopping; empty without it."""
    held_out: list[tuple[str, int]]
    """Texts for the final measurement only."""


def read_rows(
    path: Path, text_column: str = "text", label_column: str | None = "label"
) -> list[DataRow]:
    """Read the rows of a CSV, TSV or JSONL file (UTF-8), without blank lines.

    Labels may be numbers; without ``label_column`` they are empty.

    Raises:
        DataError: the file cannot be read, or a line is invalid; the message names the line.
    """
    records = _FORMATS.get(path.suffix.lower())
    if records is None:
        raise DataError(f"{path}: the file extension must be one of {', '.join(_FORMATS)}")
    columns = [text_column] if label_column is None else [text_column, label_column]
    rows = []
    for line, record in records(path, _read(path), columns):
        text, *label = (_cell(path, line, column, record[column]) for column in columns)
        rows.append(DataRow(line, text, "".join(label)))
    return rows


def label_names(path: Path, rows: Sequence[DataRow]) -> tuple[str, ...]:
    """Return the distinct labels in the order of their ids: numerically, or else by name.

    Raises:
        DataError: there are fewer than two labels.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        found = f"all {len(rows)} rows have the label {min(names)!r}" if names else "no rows"
        raise DataError(f"{path}: {found}; at least two labels are required")
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_ids(path: Path, rows: Sequence[DataRow], names: Sequence[str]) -> NDArray[np.int64]:
    """Return each row's label as its index in ``names``.

    Raises:
        DataError: a label is not in ``names``; the message names its line.
    """
    ids = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in ids:
            known = ", ".join(ids)
            raise DataError(f"{path}:{row.line}: unknown label {row.label!r}; allowed: {known}")
    return np.array([ids[row.label] for row in rows], np.int64)


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
        unique.setdefault(" ".join(text.casefold().split()), (text, label))
    if len(unique) < MIN_TEXTS:
        raise DataError(f"got {len(unique)} distinct texts; at least {MIN_TEXTS} are required")
    by_label: list[list[str]] = [[] for _ in names]
    for text, label in unique.values():
        by_label[ids[label]].append(text)
    return by_label


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not valid UTF-8") from None


Records = Iterator[tuple[int, dict[str, Any]]]


def _csv(path: Path, text: str, columns: Sequence[str], delimiter: str = ",") -> Records:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, header = 1, None
    try:
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                _require(path, line, columns, header)
            elif len(cells) != len(header):
                raise DataError(f"{path}:{line}: got {len(cells)} cells; expected {len(header)}")
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}") from None


def _jsonl(path: Path, text: str, columns: Sequence[str]) -> Records:
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            record = json.loads(written)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise DataError(f"{path}:{line}: not valid JSON: {why}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: expected an object, got {written.strip()[:40]!r}")
        _require(path, line, columns, record)
        yield line, record


_FORMATS: dict[str, Callable[[Path, str, Sequence[str]], Records]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}


def _require(path: Path, line: int, columns: Sequence[str], present: Collection[str]) -> None:
    for column in columns:
        if column not in present:
            known = ", ".join(map(repr, present))
            raise DataError(f"{path}:{line}: no column {column!r}; columns: {known or 'none'}")


def _cell(path: Path, line: int, column: str, value: Any) -> str:
    if isinstance(value, int):  # labels may be numbers or booleans
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise DataError(f"{path}:{line}: {column}: expected a string, got {json.dumps(value)[:40]}")
    if not value.strip():
        raise DataError(f"{path}:{line}: {column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}:{line}: {column} contains a lone surrogate") from None
    return value
