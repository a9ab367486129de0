"""Texts and labels out of a user's file, and their parts to train on and to measure with.

Every row that cannot be used is named by its file and line. Pure: no torch, nothing is kept.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import TandemError

MIN_ROWS = 10
"""Different texts in all; fewer neither train nor measure anything."""


class DataError(TandemError):
    """A file of texts and labels is not as it must be."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a file."""

    line: int
    """Where it begins in the file, from 1."""
    text: str
    label: str
    """Empty where no labels were asked for."""


@dataclass(frozen=True, slots=True)
class Split:
    """Texts with their label ids, shuffled; no text stands in two parts."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    """Says when to stop; empty if nothing asks it."""
    held_out: list[tuple[str, int]]
    """Measures the result and decides nothing."""


def read_rows(
    path: Path, text_column: str = "text", label_column: str | None = "label"
) -> list[Row]:
    """The rows of a CSV, TSV or JSONL file, blank lines left out.

    Args:
        path: The file, UTF-8; its ending tells the format.
        text_column: The column (or key) of the texts.
        label_column: That of the labels, numbers allowed; None: none are wanted.

    Raises:
        DataError: it cannot be read, or a line is wrong; the message names the line.
    """
    records = _FORMATS.get(path.suffix.lower())
    if records is None:
        raise DataError(f"{path}: the name must end in one of {', '.join(_FORMATS)}")
    columns = [text_column] if label_column is None else [text_column, label_column]
    rows = []
    for line, record in records(path, _read(path), columns):
        text, *label = (_cell(path, line, column, record[column]) for column in columns)
        rows.append(Row(line, text, "".join(label)))
    return rows


def label_names(path: Path, rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels that occur, in the order of their ids: numbers by value, else by the alphabet.

    Raises:
        DataError: there are fewer than two.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        found = f"all {len(rows)} rows have the label {min(names)!r}" if names else "it has no rows"
        raise DataError(f"{path}: {found}; at least two labels are needed")
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_ids(path: Path, rows: Sequence[Row], names: Sequence[str]) -> NDArray[np.int64]:
    """The place of each row's label among ``names``.

    Raises:
        DataError: a label is not among them; the message names its line.
    """
    ids = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in ids:
            known = ", ".join(ids)
            raise DataError(f"{path}:{row.line}: label {row.label!r}; the model knows {known}")
    return np.array([ids[row.label] for row in rows], np.int64)


def split(
    texts: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
    held_out: float,
    validation: float = 0.0,
    seed: int = 0,
) -> Split:
    """Part the texts, each label by the same shares.

    A text counts once, with its first label, however it is spaced and capitalized.

    Args:
        texts: In any order.
        labels: For each text one of ``names``.
        names: The labels in the order of their ids.
        held_out: Share that measures the result.
        validation: Share that says when to stop; may be 0.
        seed: Of the shuffling.

    Raises:
        DataError: the labels do not fit, or a label has too few texts for all parts.
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
                f"the label {names[label]!r} has {len(members)} different texts; "
                f"at least {start + 1} are needed"
            )
    for part_rows in parts:
        rng.shuffle(part_rows)
    return Split(train=parts[2], validation=parts[1], held_out=parts[0])


def _unique_by_label(
    texts: Sequence[str], labels: Sequence[str], names: Sequence[str]
) -> list[list[str]]:
    if len(texts) != len(labels):
        raise DataError(f"labels: got {len(labels)} for {len(texts)} texts; one each is needed")
    ids = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(labels) - ids.keys()):
        raise DataError(f"labels: got {unknown[0]!r}; allowed: {', '.join(ids)}")
    unique: dict[str, tuple[str, str]] = {}
    for text, label in zip(texts, labels, strict=True):
        unique.setdefault(" ".join(text.casefold().split()), (text, label))
    if len(unique) < MIN_ROWS:
        raise DataError(f"got {len(unique)} different texts; at least {MIN_ROWS} are needed")
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


def _tsv(path: Path, text: str, columns: Sequence[str]) -> Records:
    return _csv(path, text, columns, "\t")


def _jsonl(path: Path, text: str, columns: Sequence[str]) -> Records:
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            record = json.loads(written)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
            raise DataError(f"{path}:{line}: not valid JSON: {why}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{line}: expected an object, got {written.strip()[:40]!r}")
        _require(path, line, columns, record)
        yield line, record


_FORMATS: dict[str, Callable[[Path, str, Sequence[str]], Records]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}


def _require(path: Path, line: int, columns: Sequence[str], there: Collection[str]) -> None:
    for column in columns:
        if column not in there:
            known = ", ".join(map(repr, there))
            raise DataError(f"{path}:{line}: no column {column!r}; there are {known or 'none'}")


def _cell(path: Path, line: int, column: str, value: Any) -> str:
    if isinstance(value, int):  # a label may be a number or a truth value
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise DataError(f"{path}:{line}: {column}: expected a text, got {json.dumps(value)[:40]}")
    if not value.strip():
        raise DataError(f"{path}:{line}: {column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}:{line}: {column}: holds a lone surrogate") from None
    return value
