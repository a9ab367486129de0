"""Traces in files: Mooncake's JSON lines and BurstGPT's CSV."""

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import TraceError
from cluster.simulation.requests import Trace, TraceRequest

MOONCAKE_BLOCK = 512
BURSTGPT_BLOCK = 64
"""Where nothing is known of a prompt but its length, blocks only count."""
MAX_TOKENS = 10**8
"""Of one request; more is a mistake in the file."""


def read_trace(path: Path) -> Trace:
    """Read a trace; ``.csv`` is BurstGPT's format, everything else Mooncake's.

    Raises:
        TraceError: the file cannot be read or has no request, or a line of it is malformed; names
            the line.
    """
    is_csv = path.suffix.lower() == ".csv"
    block_tokens = BURSTGPT_BLOCK if is_csv else MOONCAKE_BLOCK
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            read = _burstgpt if is_csv else _mooncake
            requests = list(_parsed(path, read(lines)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from None
    if not requests:
        raise TraceError(f"{path}: there is no request in it")
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(path.name, requests, block_tokens)


Parsed = tuple[int, Callable[[], TraceRequest | None]]
"""The number of a line, and what reads it; None: the line says nothing."""


def _parsed(path: Path, lines: Iterator[Parsed]) -> Iterator[TraceRequest]:
    for number, read in lines:
        try:
            request = read()
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise TraceError(f"{path}, line {number}: {reason}") from None
        if request is not None:
            yield request


def _mooncake(lines: Iterator[str]) -> Iterator[Parsed]:
    for number, line in enumerate(lines, 1):
        yield number, lambda text=line: _from_mooncake(text)  # type: ignore[misc]


def _from_mooncake(line: str) -> TraceRequest | None:
    if not line.strip():
        return None
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("an object is expected")
    prompt = _count(fields, "input_length", least=1)
    blocks = fields["hash_ids"]
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers")
    full = tuple(blocks[: prompt // MOONCAKE_BLOCK])
    answer = max(1, _count(fields, "output_length"))  # some had no answer
    return TraceRequest(_seconds(fields, "timestamp") / 1000, prompt, answer, full)


def _burstgpt(lines: Iterator[str]) -> Iterator[Parsed]:
    rows = csv.DictReader(lines)
    # A session's blocks and tokens so far.
    sessions: dict[str, tuple[tuple[int, ...], int]] = {}
    ids = itertools.count(1)
    yield 1, lambda: _check_header(rows.fieldnames)
    for row in rows:
        yield rows.line_num, lambda row=row: _from_burstgpt(row, sessions, ids)  # type: ignore[misc]


def _check_header(names: Any) -> None:
    missing = {"Timestamp", "Request tokens", "Response tokens"} - set(names or ())
    if missing:
        raise ValueError(f"the header has no {', '.join(sorted(missing))}")


def _from_burstgpt(
    row: Mapping[str, str], sessions: dict[str, tuple[tuple[int, ...], int]], ids: Iterator[int]
) -> TraceRequest | None:
    at = _seconds(row, "Timestamp")
    prompt, answer = _count(row, "Request tokens"), _count(row, "Response tokens")
    if not prompt or not answer:  # it failed
        return None
    session = row.get("Session ID") or None
    blocks, before = sessions.get(session, ((), 0)) if session else ((), 0)
    if prompt < before:  # it does not go on from there
        blocks = ()
    blocks = (*blocks, *itertools.islice(ids, prompt // BURSTGPT_BLOCK - len(blocks)))
    total = prompt + answer
    more = tuple(itertools.islice(ids, (total - 1) // BURSTGPT_BLOCK - len(blocks)))
    if session:
        sessions[session] = (*blocks, *more), total
    return TraceRequest(at, prompt, answer, blocks, more, session)


def _count(fields: Mapping[str, Any], name: str, least: int = 0) -> int:
    value = fields[name]
    number = float(value)
    if isinstance(value, bool) or not number.is_integer() or not least <= number <= MAX_TOKENS:
        raise ValueError(f"{name} must be a whole number from {least} to {MAX_TOKENS}, not {value}")
    return int(number)


def _seconds(fields: Mapping[str, Any], name: str) -> float:
    number = float(fields[name])
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be at least 0, not {fields[name]}")
    return number
