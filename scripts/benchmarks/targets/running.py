"""What every target yields, and the engine that stands behind all of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
    ray_address: str = ""
    """Of its Ray cluster, where it has one: for a job that joins it."""
    job_environment: Mapping[str, str] = field(default_factory=dict)
    """What such a job needs in its environment beside that of the home."""


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
