"""Traces from files: Mooncake's JSON lines and BurstGPT's CSV."""

import csv
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import TraceError
from cluster.simulation.requests import Trace, TraceRequest

MOONCAKE_BLOCK = 512
"""Tokens per block of Mooncake's traces."""
BURSTGPT_BLOCK = 64
"""Block size for prompts of which only the length is known."""
MAX_TOKENS = 10**8
"""Bound of one request's tokens; more is a mistake in the file."""


def read_trace(path: Path) -> Trace:
    """Read a trace; ``.csv`` is BurstGPT's format, everything else Mooncake's.

    Raises:
        TraceError: the file cannot be read or has no requests, or a line is malformed; the message
            names the line.
    """
    is_csv = path.suffix.lower() == ".csv"
    block_tokens = BURSTGPT_BLOCK if is_csv else MOONCAKE_BLOCK
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            requests = list((_read_burstgpt if is_csv else _read_mooncake)(path, lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from None
    if not requests:
        raise TraceError(f"{path}: the file has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(path.name, requests, block_tokens)


@contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """Name the line in the error if it is malformed."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise TraceError(f"{path}, line {number}: {reason}") from None


def _read_mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            with _line(path, number):
                request = _parse_mooncake(line)
            yield request


def _parse_mooncake(line: str) -> TraceRequest:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("expected a JSON object")
    prompt = _count(fields, "input_length", minimum=1)
    blocks = fields["hash_ids"]
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers")
    full = tuple(blocks[: prompt // MOONCAKE_BLOCK])
    answer = max(1, _count(fields, "output_length"))  # some requests had no answer
    return TraceRequest(_seconds(fields, "timestamp") / 1000, prompt, answer, full)


def _read_burstgpt(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    rows = csv.DictReader(lines)
    # Blocks and tokens of each session so far.
    sessions: dict[str, tuple[tuple[int, ...], int]] = {}
    ids = itertools.count(1)
    missing = {"Timestamp", "Request tokens", "Response tokens"} - set(rows.fieldnames or ())
    if missing:
        raise TraceError(f"{path}, line 1: the header has no {', '.join(sorted(missing))}")
    for row in rows:
        with _line(path, rows.line_num):
            request = _parse_burstgpt(row, sessions, ids)
        if request is not None:
            yield request


def _parse_burstgpt(
    row: Mapping[str, str], sessions: dict[str, tuple[tuple[int, ...], int]], ids: Iterator[int]
) -> TraceRequest | None:
    at = _seconds(row, "Timestamp")
    prompt, answer = _count(row, "Request tokens"), _count(row, "Response tokens")
    if not prompt or not answer:  # a failed request
        return None
    session = row.get("Session ID") or None
    blocks, tokens_before = sessions.get(session, ((), 0)) if session else ((), 0)
    if prompt < tokens_before:  # not a continuation of the session
        blocks = ()
    blocks = (*blocks, *itertools.islice(ids, prompt // BURSTGPT_BLOCK - len(blocks)))
    total = prompt + answer
    answer_blocks = tuple(itertools.islice(ids, (total - 1) // BURSTGPT_BLOCK - len(blocks)))
    if session:
        sessions[session] = (*blocks, *answer_blocks), total
    return TraceRequest(at, prompt, answer, blocks, answer_blocks, session)


def _count(fields: Mapping[str, Any], name: str, minimum: int = 0) -> int:
    value = fields[name]
    number = float(value)
    if isinstance(value, bool) or not number.is_integer() or not minimum <= number <= MAX_TOKENS:
        raise ValueError(
            f"{name} must be a whole number from {minimum} to {MAX_TOKENS}, not {value}"
        )
    return int(number)


def _seconds(fields: Mapping[str, Any], name: str) -> float:
    number = float(fields[name])
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be at least 0, not {fields[name]}")
    return number
