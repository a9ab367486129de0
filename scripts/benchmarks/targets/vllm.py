"""vLLM's own server, and ``vllm-router``, vLLM's router in Rust."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.bare import spawn_bare
from benchmarks.targets.home import new_home
from benchmarks.targets.peer_environment import install_peer, use_our_packages
from benchmarks.targets.running import (
    REAL_MODEL,
    SIM_MODEL,
    ReadyTarget,
    RunningTarget,
    wait_first_token,
)
from cluster.engines.vllm.environment import BINDING_VARIABLE, bind_threads

ROUTER_PACKAGE = "vllm-router==0.1.17"
ROUTER_READY_S = 60.0
ZENTORCH_PACKAGE = "zentorch==2.13.0.2"  # for the installed PyTorch
IOMP = Path(sys.prefix) / "lib" / "libiomp5.so"
KV_BYTES = 512 * 1024**2
"""KV cache of the tuned peers; ``ray-config.yaml`` has the same size, context and block size."""
TUNED_ENGINE = {
    "max_model_len": 2048,
    "kv_cache_memory_bytes": KV_BYTES,
    "block_size": 32,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
}
"""Arguments of vLLM's engine that equal those of the default cluster's generator."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options and environment of vLLM's server."""

    # The default KV cache is 92 % of the machine's memory, which may not be free.
    arguments: tuple[str, ...] = ("--gpu-memory-utilization", "0.5")
    environment: Mapping[str, str] = field(default_factory=dict)
    python: Path = Path(sys.executable)


def tuned_environment() -> dict[str, str]:
    """Return variables with which vLLM computes on all cores, in its engine core's process."""
    return {
        BINDING_VARIABLE: bind_threads(sorted(os.sched_getaffinity(0)), 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def tuned_options(*, compiled: bool = False, iomp: bool = False) -> ServerOptions:
    """Return options for all cores and the cluster's KV cache; eager unless ``compiled``."""
    sizes = [
        word
        for name, value in TUNED_ENGINE.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    arguments = (
        *sizes,
        "--disable-uvicorn-access-log",
        *(() if compiled else ("--enforce-eager",)),
    )
    preload = {"LD_PRELOAD": str(IOMP)} if iomp else {}
    return ServerOptions(arguments, {**tuned_environment(), **preload})


def zentorch_options() -> ServerOptions:
    """Return tuned options with AMD's extension of PyTorch, which vLLM loads as a plugin."""
    environment = install_peer(ZENTORCH_PACKAGE.replace("==", "-"), [ZENTORCH_PACKAGE], "torch")
    use_our_packages(environment)
    tuned = tuned_options(compiled=True)
    return ServerOptions(tuned.arguments, tuned.environment, environment / "bin" / "python")


@contextlib.contextmanager
def vllm_serve(model: str, options: ServerOptions | None = None) -> Iterator[ReadyTarget]:
    """Run vLLM's server, by default as documented: compiled, with vLLM's compile cache.

    ``model`` is the model's directory.
    """
    options = options or ServerOptions()
    (port,) = free_ports(1)
    endpoint = Endpoint(port, REAL_MODEL)
    command: tuple[str | Path, ...] = (
        *(options.python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", REAL_MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *options.arguments,
    )
    with new_home("vllm") as home:
        began = time.monotonic()
        home.spawn(*command, environment=options.environment)
        wait_first_token(home, endpoint, "/health")
        ready_s = time.monotonic() - began
        running = RunningTarget(endpoint, home)
        yield ReadyTarget(running, ready_s, running.command)


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
