"""When a server of a real model is ready: its health is good and a token has come."""

import contextlib
import time
from dataclasses import dataclass

from benchmarks.endpoint import Endpoint, TargetError, ask
from benchmarks.targets.home import POLL_S, Home
from benchmarks.targets.running import Running

NAME = "smollm2"
"""The model's name in requests."""
READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A server that has given a token."""

    running: Running
    ready_s: float
    """Since its first process was started."""


def wait_first_token(home: Home, endpoint: Endpoint, health: str) -> None:
    """Return once ``health`` answers with 200 and a request for one token has got it.

    Raises:
        TargetError: a process of the target failed, or the time is over.
    """
    deadline = time.monotonic() + READY_S
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1, "stream": True}
    request = endpoint.request("/v1/completions", body)
    home.wait_ready(endpoint, READY_S, health)
    while time.monotonic() < deadline:
        with contextlib.suppress(TargetError):
            ask(endpoint, request)
            return
        time.sleep(POLL_S)
    home.fail(f"{endpoint.url} gave no token within {READY_S:g} s")
