"""What every target yields, and the engine that stands behind all of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.targets.home import Home

MODEL = "sim"


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    endpoint: Endpoint
    home: Home
    """All of its processes."""


Target = Callable[[float], AbstractContextManager[Running]]
"""Starts a server before a simulated engine that takes so many seconds for a token."""


def generator(decode_s: float) -> dict[str, Any]:
    """The simulated engine, as the configuration of a generator."""
    return {
        "name": MODEL,
        "model": MODEL,
        "engine": "sim",
        "sim": {"decode_s_per_token": decode_s},
    }
