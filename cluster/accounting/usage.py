"""Hourly sums of usage by tenant and model, and their JSON and CSV forms. Pure."""

import csv
import io
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from cluster.accounting import REASONS
from cluster.errors import InvalidRequestError

HOUR_S = 3600


class UsageKey(NamedTuple):
    """Key of one sum."""

    hour: int
    """Start of the hour, Unix time in seconds."""
    tenant: str
    model: str
    source: str
    """Source of the joules, or the reason why there are none (``REASONS``)."""


@dataclass(slots=True)
class UsageSums:
    """Sums of one hour."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    joules: float = 0.0
    cost: float = 0.0

    def add(self, other: "UsageSums") -> None:
        # Called for each request; a loop over the fields takes ten times as long.
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.joules += other.joules
        self.cost += other.cost


UsageRow = tuple[UsageKey, UsageSums]


def merge_rows(files: Iterable[Iterable[UsageRow]]) -> list[UsageRow]:
    """Return the sums of several files, in the order of one file."""
    merged: dict[UsageKey, UsageSums] = {}
    for rows in files:
        for key, sums in rows:
            merged.setdefault(key, UsageSums()).add(sums)
    return sorted(merged.items(), key=lambda row: row[0])


def parse_time(text: str, param: str) -> float:
    """Return the Unix time of Unix seconds or an ISO 8601 time, which is UTC by default.

    Raises:
        InvalidRequestError: The text is neither.
    """
    with suppress(ValueError, OverflowError, OSError):  # not a number, or out of range
        return datetime.fromtimestamp(float(text), UTC).timestamp()
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequestError(
            f"{param}: got {text[:40]!r}, expected Unix seconds or an ISO 8601 time", param=param
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def as_json(rows: Iterable[UsageRow], currency: str | None) -> dict[str, Any]:
    """Return the response of ``GET /v1/usage``; missing values are null, with the reason.

    ``currency`` is None if no price is configured.
    """
    rows = list(rows)
    total = UsageSums()
    for _, sums in rows:
        total.add(sums)
    return {
        "object": "list",
        "currency": currency,
        "data": [_row(*row, currency is not None) for row in rows],
        "total": {
            **asdict(total),
            "joules": total.joules if any(key.source not in REASONS for key, _ in rows) else None,
            "cost": total.cost if currency is not None else None,
        },
    }


def _row(key: UsageKey, sums: UsageSums, priced: bool) -> dict[str, Any]:
    row = {"hour": _hour(key), "tenant": key.tenant, "model": key.model, **asdict(sums)}
    if not priced:
        row["cost"] = None
    if key.source in REASONS:
        return {**row, "joules": None, "joules_missing": REASONS[key.source]}
    return {**row, "joules_source": key.source}


def as_csv(rows: Iterable[UsageRow]) -> str:
    """Return one line per row; missing ``joules`` are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    names = [field.name for field in fields(UsageSums)]
    writer.writerow(["hour", "tenant", "model", *names, "joules_source"])
    for key, sums in rows:
        cells = asdict(sums)
        if key.source in REASONS:
            cells["joules"] = ""
        # Spreadsheets run cells that start like a formula.
        tenant = f"'{key.tenant}" if key.tenant.startswith(("=", "+", "-", "@")) else key.tenant
        writer.writerow([_hour(key), tenant, key.model, *cells.values(), key.source])
    return out.getvalue()


def _hour(key: UsageKey) -> str:
    return datetime.fromtimestamp(key.hour, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
