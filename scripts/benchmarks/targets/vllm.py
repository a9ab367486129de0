"""vLLM's own server, and ``vllm-router``, vLLM's router in Rust."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.bare import spawn_bare
from benchmarks.targets.home import new_home
from benchmarks.targets.peer_environment import install_peer
from benchmarks.targets.running import (
    REAL_MODEL,
    SIM_MODEL,
    ReadyTarget,
    RunningTarget,
    wait_first_token,
)

ROUTER_PACKAGE = "vllm-router==0.1.17"
ROUTER_READY_S = 60.0


@contextlib.contextmanager
def vllm_serve(model: str) -> Iterator[ReadyTarget]:
    """Run vLLM's server with its defaults: compiled, with vLLM's compile cache.

    ``model`` is the model's directory.
    """
    (port,) = free_ports(1)
    endpoint = Endpoint(port, REAL_MODEL)
    with new_home("vllm") as home:
        began = time.monotonic()
        home.spawn(
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", REAL_MODEL),
            *("--host", "127.0.0.1", "--port", str(port)),
            # The default KV cache is 92 % of the machine's memory, which may not be free.
            *("--gpu-memory-utilization", "0.5"),
        )
        wait_first_token(home, endpoint, "/health")
        yield ReadyTarget(RunningTarget(endpoint, home), time.monotonic() - began)


@contextlib.contextmanager
def vllm_router(decode_s: float) -> Iterator[RunningTarget]:
    """Run the router in front of one bare uvicorn process with a simulated engine."""
    binary = install_vllm_router()
    with new_home("router") as home:
        worker = spawn_bare(home, decode_s)
        port, metrics = free_ports(2)
        home.spawn(
            binary,
            *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
            *("--worker-urls", worker.url),
            *("--policy", "round_robin", "--log-level", "warning"),
        )
        endpoint = Endpoint(port, SIM_MODEL)
        home.wait_ready(endpoint, ROUTER_READY_S)
        yield RunningTarget(endpoint, home)


def install_vllm_router() -> Path:
    """Return the router's executable; install it if it is missing."""
    return install_peer(ROUTER_PACKAGE.replace("==", "-"), [ROUTER_PACKAGE]) / "bin" / "vllm-router"
