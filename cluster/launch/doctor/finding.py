"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    message: str
    """What was found."""
    advice: str = ""
    """What to do about it; "" where nothing is to be done."""


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", message)


def warn(check: str, message: str, advice: str) -> Finding:
    """It works, though not as well as it might."""
    return Finding(check, "warn", message, advice)


def fail(check: str, message: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(check, "fail", message, advice)
