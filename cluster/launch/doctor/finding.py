"""Result of a diagnostic check."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]
"""``fail``: a problem that prevents serving; ``warn``: a limitation."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    level: Level
    message: str
    advice: str = ""
    """Recommended action; empty if none is needed."""


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warn(check: str, message: str, advice: str) -> Finding:
    return Finding(check, "warn", message, advice)


def fail(check: str, message: str, advice: str) -> Finding:
    return Finding(check, "fail", message, advice)
