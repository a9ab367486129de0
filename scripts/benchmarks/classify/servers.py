"""Servers that ``bench classify`` compares, all with the same model."""

import contextlib
import os
import subprocess
import sys
import tempfile
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
OFFLINE = {"PYTHONPATH": "", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
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


def infinity(*options: str) -> Callable[[], AbstractContextManager[RunningTarget]]:
    """Return a start function of Infinity with its PyTorch engine."""

    @contextlib.contextmanager
    def server() -> Iterator[RunningTarget]:
        with _infinity(
            install_infinity(), models_dir() / MODEL, "--engine", "torch", *options
        ) as running:
            yield running

    return server


@contextlib.contextmanager
def infinity_onnx() -> Iterator[RunningTarget]:
    """Run Infinity with ONNX Runtime and optimum's optimized graph, in float32."""
    environment = install_infinity_onnx()
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as directory:
        exporter = environment / "bin" / "optimum-cli"
        task = ("--task", "text-classification")
        subprocess.run(
            (exporter, "export", "onnx", "--model", models_dir() / MODEL, *task, directory),
            env={**os.environ, **OFFLINE},
            check=True,
            capture_output=True,
        )
        binary = environment / "bin" / "infinity_emb"
        with _infinity(binary, Path(directory), "--engine", "optimum") as running:
            yield running


@contextlib.contextmanager
def _infinity(binary: Path, model: Path, *options: str) -> Iterator[RunningTarget]:
    (port,) = free_ports(1)
    endpoint = Endpoint(port, MODEL)
    with new_home("infinity") as home:
        home.spawn(
            binary, "v2", "--model-id", model, "--served-model-name", MODEL, "--device", "cpu",
            *options, "--host", "127.0.0.1", "--port", str(port), "--no-model-warmup",
            environment={**OFFLINE, "HF_HOME": str(home.path)},  # it caches optimized graphs there
        )  # fmt: skip
        home.wait_ready(endpoint, READY_S, "/health")
        yield RunningTarget(endpoint, home)


def install_infinity() -> Path:
    """Return Infinity's executable; install it if it is missing.

    It uses this environment's PyTorch, so that both run the same kernels.
    """
    environment = install_peer("infinity-emb-0.0.78", INFINITY_REQUIREMENTS, leave_out="torch")
    use_our_packages(environment)
    return environment / "bin" / "infinity_emb"


def install_infinity_onnx() -> Path:
    """Return the environment of Infinity with ONNX Runtime; install it if it is missing."""
    requirements = ("infinity-emb[server,optimum]==0.0.78", *INFINITY_REQUIREMENTS[1:])
    environment = install_peer("infinity-emb-onnx-0.0.78", requirements, leave_out="torch")
    use_our_packages(environment)
    return environment


def vllm(*, compiled: bool = False) -> Callable[[], AbstractContextManager[RunningTarget]]:
    """Return a start function of vLLM's own server with the same model on all cores."""

    @contextlib.contextmanager
    def server() -> Iterator[RunningTarget]:
        (port,) = free_ports(1)
        endpoint = Endpoint(port, MODEL)
        with new_home("vllm") as home:
            home.spawn(
                sys.executable, "-m", "vllm.entrypoints.openai.api_server",
                "--model", models_dir() / MODEL, "--served-model-name", MODEL,
                "--host", "127.0.0.1", "--port", str(port), "--runner", "pooling",
                "--dtype", "bfloat16", "--disable-uvicorn-access-log",
                *(() if compiled else ("--enforce-eager",)),
                environment={
                    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "HF_HUB_OFFLINE": "1",
                },
            )  # fmt: skip
            home.wait_ready(endpoint, READY_S, "/health")
            yield RunningTarget(endpoint, home)

    return server


BF16 = ("--dtype", "bfloat16", "--no-bettertransformer")
SERVERS: Mapping[str, Callable[[], AbstractContextManager[RunningTarget]]] = {
    "tandem": tandem(),
    SPLIT: tandem(replicas=len(os.sched_getaffinity(0)), threads=1),
    "infinity-bf16": infinity(*BF16),
    "infinity-fp32": infinity("--dtype", "float32", "--no-bettertransformer"),
    "infinity-compiled": infinity(*BF16, "--compile"),
    "infinity-onnx": infinity_onnx,
    "vllm": vllm(),
    "vllm-compiled": vllm(compiled=True),
}
