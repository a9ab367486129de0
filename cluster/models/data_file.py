"""Rows of a CSV, TSV or JSONL file of texts and labels, as spreadsheets and pandas write them.

Errors name the file and up to ten bad lines. Loads no torch.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import DataError

MAX_BAD_LINES = 10
DELIMITERS = (",", ";", "\t", "|")
_HEADER_CHARS = 65_536  # searched for the header when the delimiter is detected
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n")  # first line of some of Excel's files
_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")
_INTEGER = re.compile(r"-?\d+(\.0+)?")


@dataclass(frozen=True, slots=True)
class DataRow:
    """Text of a file, with its label."""

    line: int
    """Line in the file at which the row starts, from 1."""
    text: str
    label: str
    """Empty if no labels are read."""


class BadLines:
    """Bad lines of a file, reported together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str] = []

    def add(self, line: int, problem: str) -> None:
        """Record a bad line.

        Raises:
            DataError: ten lines are bad.
        """
        self._found.append(f"{self._path}:{line}: {problem}")
        if len(self._found) == MAX_BAD_LINES:
            self.raise_if_any()

    def fail(self, line: int, problem: str) -> NoReturn:
        """Raise ``DataError`` because reading cannot continue after this line."""
        self.add(line, problem)
        self.raise_if_any()
        raise AssertionError

    def raise_if_any(self) -> None:
        """Raise ``DataError`` if a line is bad: one line of text for each."""
        if not self._found:
            return
        if len(self._found) == 1:
            raise DataError(self._found[0])
        more = " or more" if len(self._found) == MAX_BAD_LINES else ""
        lines = "\n  ".join(self._found)
        raise DataError(f"{self._path}: {len(self._found)}{more} bad lines:\n  {lines}")


def read_rows(
    path: Path,
    text_column: str = "text",
    label_column: str | None = "label",
    encoding: str | None = None,
) -> list[DataRow]:
    """Read the rows of a CSV, TSV or JSONL file, without blank lines.

    The delimiter is detected. Labels may be numbers; if all labels are integers, ``1.0`` (as pandas
    writes a column with gaps) is read as ``1``. Without ``label_column`` labels are empty. The
    default encoding is UTF-8, or UTF-16 if the file starts with its byte order mark.

    Raises:
        DataError: the file cannot be read, or lines are invalid; the message names the lines.
    """
    records = _FORMATS.get(path.suffix.lower())
    if records is None:
        raise DataError(f"{path}: the file extension must be one of {', '.join(_FORMATS)}")
    columns = [text_column] if label_column is None else [text_column, label_column]
    bad_lines = BadLines(path)
    rows = []
    for line, record in records(_read(path, encoding, bad_lines), columns, bad_lines):
        try:
            text, *label = (_cell(column, record[column]) for column in columns)
        except ValueError as error:
            bad_lines.add(line, str(error))
        else:
            rows.append(DataRow(line, text, "".join(label)))
    bad_lines.raise_if_any()
    if all(_INTEGER.fullmatch(row.label) for row in rows):
        rows = [replace(row, label=plain_integer(row.label)) for row in rows]
    return rows


def plain_integer(label: str) -> str:
    """Return ``1`` for ``1.0``, and other labels unchanged."""
    found = _WHOLE_FLOAT.fullmatch(label)
    return found[1] if found else label


def _read(path: Path, encoding: str | None, bad_lines: BadLines) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    has_utf16_mark = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    chosen = encoding or ("utf-16" if has_utf16_mark else "utf-8")
    try:
        return raw.decode(chosen).removeprefix("\ufeff")
    except LookupError:
        raise DataError(
            f"unknown encoding {chosen!r}; examples: utf-8, utf-16, cp1252 (Excel), shift_jis"
        ) from None
    except UnicodeError as error:
        problem = f"not valid {chosen.upper()}; set the file's --encoding, such as cp1252 (Excel)"
        if chosen.startswith("utf-16"):
            raise DataError(f"{path}: {problem} ({error})") from None
    for line, part in enumerate(raw.split(b"\n"), 1):
        try:
            part.decode(chosen)
        except UnicodeError:
            bad_lines.add(line, problem)
    bad_lines.raise_if_any()
    raise DataError(f"{path}: {problem}")


Records = Iterator[tuple[int, dict[str, Any]]]


def _csv(text: str, columns: Sequence[str], bad_lines: BadLines, delimiter: str = ",") -> Records:
    separator_line = _SEPARATOR_LINE.match(text)
    if separator_line:
        delimiter = separator_line[1]
        text = text[separator_line.end() :]
    else:
        delimiter = _detect_delimiter(text, columns, delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, header = 1, None
    skipped = 1 if separator_line else 0
    try:
        while True:
            line = reader.line_num + 1 + skipped
            cells = next(reader, None)
            if cells is None:
                return
            if not any(map(str.strip, cells)):  # spreadsheets write empty rows as ";;"
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if problem := _header_problem(columns, header):
                    bad_lines.fail(line, problem)
            elif len(cells) != len(header):
                bad_lines.add(line, f"got {len(cells)} cells; expected {len(header)}")
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        bad_lines.fail(line, f"not valid CSV: {error}")


def _detect_delimiter(text: str, columns: Sequence[str], usual: str) -> str:
    """Return the delimiter with which the header has the required columns, or most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        reader = csv.reader(io.StringIO(text[:_HEADER_CHARS], newline=""), delimiter=delimiter)
        try:
            header = [cell.strip() for cell in next(filter(any, reader), [])]
        except csv.Error:
            header = []
        return len({*columns} & {*header}), len(header)

    return max((usual, *DELIMITERS), key=score)


def _jsonl(text: str, columns: Sequence[str], bad_lines: BadLines) -> Records:
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        try:
            record = json.loads(written, object_pairs_hook=_unique_fields)
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            if isinstance(error, json.JSONDecodeError):
                problem = error.msg
            bad_lines.add(line, f"not valid JSON: {problem}")
            continue
        if not isinstance(record, dict):
            bad_lines.add(line, f"expected an object, got {written.strip()[:40]!r}")
        elif missing := _header_problem(columns, record):
            bad_lines.add(line, missing)
        else:
            yield line, record


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two fields {duplicate!r} in one object")
    return record


_FORMATS: dict[str, Callable[[str, Sequence[str], BadLines], Records]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}


def _header_problem(columns: Sequence[str], present: Collection[str]) -> str | None:
    for column in columns:
        count = sum(name == column for name in present)
        if count == 0:
            return f"no column {column!r}; columns: {', '.join(map(repr, present)) or 'none'}"
        if count > 1:
            return f"{count} columns {column!r}; rename or remove all but one"
    return None


def _cell(column: str, value: Any) -> str:
    """Return a cell as text.

    Raises:
        ValueError: it is empty, not valid Unicode, or neither a string nor a number.
    """
    if isinstance(value, int | float) and math.isfinite(value):  # labels may be numbers
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise ValueError(f"{column}: expected a string, got {json.dumps(value)[:40]}")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column} contains a lone surrogate") from None
    return value
