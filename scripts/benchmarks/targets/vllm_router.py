"""``vllm-router``, vLLM's own router in Rust, in front of the bare uvicorn process.

Its dependencies are not ours, so it has an environment of its own below the cache directory,
made when it is first wanted.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.targets.bare import spawn_bare
from benchmarks.targets.home import free_ports, new_home
from benchmarks.targets.own_environment import own_environment
from benchmarks.targets.running import MODEL, Running

PACKAGE = "vllm-router==0.1.17"
READY_S = 60.0


@contextlib.contextmanager
def vllm_router(decode_s: float) -> Iterator[Running]:
    """The router with one worker."""
    binary = installed()
    with new_home("router") as home:
        worker = spawn_bare(home, decode_s)
        port, metrics = free_ports(2)
        home.spawn(
            binary,
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
            *("--worker-urls", worker.url),
            *("--policy", "round_robin", "--log-level", "warning"),
        )
        endpoint = Endpoint(port, MODEL)
        home.wait_ready(endpoint, READY_S)
        yield Running(endpoint, home)


def installed() -> Path:
    """The router's program, installed now if it is not there yet."""
    return own_environment(PACKAGE.replace("==", "-"), [PACKAGE]) / "bin" / "vllm-router"
