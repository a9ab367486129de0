"""Types that targets yield, and the engine configuration that all of them use."""

import contextlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.endpoint import Endpoint, TargetError, send_request
from benchmarks.targets.home import POLL_S, Home

SIM_MODEL = "sim"
REAL_MODEL = "smollm2"
"""Served name of the real model."""
READY_S = 300.0
MAX_STREAMS = 8192


@dataclass(frozen=True, slots=True)
class RunningTarget:
    """Server that answers requests."""

    endpoint: Endpoint
    home: Home
    ray_address: str = ""
    """Address for Ray jobs; empty if the target does not use Ray."""
    job_environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of such a job, in addition to those of the home."""

    @property
    def command(self) -> str:
        """Command line of each process that was started."""
        return " & ".join(self.home.commands)


@dataclass(frozen=True, slots=True)
class ReadyTarget:
    """Server of a real model that has generated a token."""

    running: RunningTarget
    ready_s: float
    """Seconds from the start of its first process to the first token."""
    command: str
    """Command line that starts it, with the environment variables that differ from the defaults."""
    healthy_s: float = 0.0
    """Seconds until all deployments were healthy; 0 for peers."""


SimTarget = Callable[[float], AbstractContextManager[RunningTarget]]
"""Start a server with a simulated engine; the argument is its decode time per token in seconds."""


def sim_generator(decode_s: float) -> dict[str, Any]:
    """Return the configuration of the simulated engine, which runs all streams at once."""
    return {
        "name": SIM_MODEL,
        "model": SIM_MODEL,
        "engine": "sim",
        "sim": {
            "decode_s_per_token": decode_s,
            "max_num_seqs": MAX_STREAMS,
            "num_kv_blocks": MAX_STREAMS * 16,
        },
        "max_in_flight": MAX_STREAMS,
    }


def wait_first_token(
    home: Home, endpoint: Endpoint, health: str, timeout_s: float = READY_S
) -> None:
    """Wait until ``health`` returns 200 and a request for one token succeeds.

    Raises:
        TargetError: A process of the target failed, or ``timeout_s`` have passed.
    """
    deadline = time.monotonic() + timeout_s
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 1, "stream": True}
    request = endpoint.encode_request("/v1/completions", body)
    home.wait_ready(endpoint, timeout_s, health)
    while time.monotonic() < deadline:
        with contextlib.suppress(TargetError):
            send_request(endpoint, request)
            return
        time.sleep(POLL_S)
    home.fail(f"{endpoint.url} generated no token within {timeout_s:g} s.")
