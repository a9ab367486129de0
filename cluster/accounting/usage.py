"""Hourly sums of what requests took, by tenant and model, and their JSON and CSV forms. Pure."""

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from cluster.accounting import REASONS
from cluster.errors import InvalidRequestError

HOUR_S = 3600


class UsageKey(NamedTuple):
    """Which sum; sorts by its fields."""

    hour: int
    """Its first second, Unix time."""
    tenant: str
    model: str
    source: str
    """What measured its joules, or why there are none."""


@dataclass(slots=True)
class UsageSums:
    """The sums of one hour."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    joules: float = 0.0
    cost: float = 0.0

    def add(self, other: "UsageSums") -> None:
        """Take in further requests."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.joules += other.joules
        self.cost += other.cost


Row = tuple[UsageKey, UsageSums]


def parse_time(text: str, param: str) -> float:
    """Unix time of a query's ``start`` or ``end``: seconds, or ISO 8601 (UTC where it says none).

    Raises:
        InvalidRequestError: it is neither.
    """
    try:
        time = _from_seconds(text) or datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        raise InvalidRequestError(
            f"{param}: got {text[:40]!r}; Unix seconds or an ISO 8601 time are allowed", param=param
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _from_seconds(text: str) -> datetime | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return datetime.fromtimestamp(seconds, UTC)


def as_json(rows: Iterable[Row], currency: str | None) -> dict[str, Any]:
    """The answer of ``GET /v1/usage``; a figure that is missing is null, with the reason.

    Args:
        rows: What was found.
        currency: Of the costs; None: no price is configured, and there are none.
    """
    rows = list(rows)
    whole = UsageSums()
    for _, sums in rows:
        whole.add(sums)
    return {
        "object": "list",
        "currency": currency,
        "data": [_row(*row, currency is not None) for row in rows],
        "total": {
            "requests": whole.requests,
            "prompt_tokens": whole.prompt_tokens,
            "cached_tokens": whole.cached_tokens,
            "completion_tokens": whole.completion_tokens,
            "joules": whole.joules if any(key.source not in REASONS for key, _ in rows) else None,
            "cost": whole.cost if currency is not None else None,
        },
    }


def _row(key: UsageKey, sums: UsageSums, priced: bool) -> dict[str, Any]:
    row = {
        "hour": _hour(key),
        "tenant": key.tenant,
        "model": key.model,
        "requests": sums.requests,
        "prompt_tokens": sums.prompt_tokens,
        "cached_tokens": sums.cached_tokens,
        "completion_tokens": sums.completion_tokens,
        "joules": None if key.source in REASONS else sums.joules,
        "cost": sums.cost if priced else None,
    }
    if key.source in REASONS:
        return {**row, "joules_missing": REASONS[key.source]}
    return {**row, "joules_source": key.source}


def as_csv(rows: Iterable[Row]) -> str:
    """One line for each row; ``joules`` is empty where it is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    names = [field.name for field in fields(UsageSums)]
    writer.writerow(["hour", "tenant", "model", *names, "joules_source"])
    for key, sums in rows:
        figures: dict[str, Any] = dict(zip(names, astuple(sums), strict=True))
        if key.source in REASONS:
            figures["joules"] = ""
        # A spreadsheet would run what begins like a formula.
        tenant = f"'{key.tenant}" if key.tenant.startswith(("=", "+", "-", "@")) else key.tenant
        writer.writerow([_hour(key), tenant, key.model, *figures.values(), key.source])
    return out.getvalue()


def _hour(key: UsageKey) -> str:
    return datetime.fromtimestamp(key.hour, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
