"""Result of a diagnostic check."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    level: Level
    message: str
    advice: str = ""
    """Recommended action; empty if none is needed."""


def ok(check: str, message: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, "ok", message)


def warn(check: str, message: str, advice: str) -> Finding:
    """Return a finding of a limitation that does not prevent serving."""
    return Finding(check, "warn", message, advice)


def fail(check: str, message: str, advice: str) -> Finding:
    """Return a finding of a problem that prevents serving."""
    return Finding(check, "fail", message, advice)
