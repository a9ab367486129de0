"""Servers that ``bench classify`` compares, all with the same model."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.home import new_home
from benchmarks.targets.peer_environment import install_peer, use_our_packages
from benchmarks.targets.running import RunningTarget
from benchmarks.targets.tandem import tandem_with_pools
from cluster.models.store import models_dir

MODEL = "sentiment-minilm"
SPLIT = "tandem-split"
"""Cluster with one replica per core, each with one thread."""
READY_S = 300.0
INFINITY = "infinity-emb[server]==0.0.78"
INFINITY_REQUIREMENTS = (
    *(INFINITY, "transformers<5", "sentence-transformers<5.2"),
    *("datasets<4", "pyarrow<19"),  # ours, which it would find otherwise, do not fit its numpy
)


def tandem(
    replicas: int = 1, threads: int | None = None
) -> Callable[[], AbstractContextManager[RunningTarget]]:
    """Return a start function of a cluster with one classifier and no generator."""
    pool = {"min": replicas, "max": replicas}
    classifier = {"name": MODEL, "model": MODEL, "replicas": pool, "threads": threads}
    return lambda: tandem_with_pools({"classifiers": [classifier]}, MODEL)


def infinity(dtype: str) -> Callable[[], AbstractContextManager[RunningTarget]]:
    """Return a start function of Infinity with its PyTorch engine."""

    @contextlib.contextmanager
    def server() -> Iterator[RunningTarget]:
        binary = install_infinity()
        (port,) = free_ports(1)
        endpoint = Endpoint(port, MODEL)
        with new_home("infinity") as home:
            home.spawn(
                binary, "v2", "--model-id", models_dir() / MODEL, "--served-model-name", MODEL,
                "--engine", "torch", "--device", "cpu", "--dtype", dtype, "--no-bettertransformer",
                "--host", "127.0.0.1", "--port", str(port), "--no-model-warmup",
                environment={"PYTHONPATH": "", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            home.wait_ready(endpoint, READY_S, "/health")
            yield RunningTarget(endpoint, home)

    return server


def install_infinity() -> Path:
    """Return Infinity's executable; install it if it is missing.

    It uses this environment's PyTorch, so that both run the same kernels.
    """
    environment = install_peer("infinity-emb-0.0.78", INFINITY_REQUIREMENTS, leave_out="torch")
    use_our_packages(environment)
    return environment / "bin" / "infinity_emb"


@contextlib.contextmanager
def vllm() -> Iterator[RunningTarget]:
    """Run vLLM's own server with the same model, in eager mode for CPUs."""
    (port,) = free_ports(1)
    endpoint = Endpoint(port, MODEL)
    with new_home("vllm") as home:
        home.spawn(
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", models_dir() / MODEL, "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(port), "--runner", "pooling",
            "--dtype", "bfloat16", "--enforce-eager", "--disable-uvicorn-access-log",
            environment={
                "VLLM_CPU_OMP_THREADS_BIND": "0-1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )  # fmt: skip
        home.wait_ready(endpoint, READY_S, "/health")
        yield RunningTarget(endpoint, home)


SERVERS: Mapping[str, Callable[[], AbstractContextManager[RunningTarget]]] = {
    "tandem": tandem(),
    SPLIT: tandem(replicas=len(os.sched_getaffinity(0)), threads=1),
    "infinity-bf16": infinity("bfloat16"),
    "infinity-fp32": infinity("float32"),
    "vllm": vllm,
}
