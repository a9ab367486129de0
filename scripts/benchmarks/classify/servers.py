"""The servers that ``bench classify`` compares: each a context manager, all with one model."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.targets.home import free_ports, new_home
from benchmarks.targets.own_environment import own_environment
from benchmarks.targets.running import Running
from benchmarks.targets.tandem import tandem_of
from cluster.models.store import models_dir

MODEL = "sentiment-minilm"
SPLIT = "tandem-split"
"""A replica of one thread for each core."""
READY_S = 300.0
INFINITY = "infinity-emb[server]==0.0.78"
INFINITY_WANTS = (INFINITY, "transformers<5", "sentence-transformers<5.2")


def tandem(
    replicas: int = 1, threads: int | None = None
) -> Callable[[], AbstractContextManager[Running]]:
    """The cluster as ``tandem up`` starts it, with one classifier and no generator."""
    pool = {"min": replicas, "max": replicas}
    classifier = {"name": MODEL, "model": MODEL, "replicas": pool, "threads": threads}
    return lambda: tandem_of({"classifiers": [classifier]}, MODEL)


def infinity(dtype: str) -> Callable[[], AbstractContextManager[Running]]:
    """Infinity with its PyTorch engine, in one type."""

    @contextlib.contextmanager
    def server() -> Iterator[Running]:
        binary = infinity_installed()
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
            yield Running(endpoint, home)

    return server


def infinity_installed() -> Path:
    """Infinity's program, installed now if it is not there yet.

    Its environment has everything of its own but PyTorch, which it shares with this one: the same
    kernels for both.
    """
    place = own_environment("infinity-emb-0.0.78", INFINITY_WANTS, leave_out="torch")
    (own,) = (place / "lib").glob("python*/site-packages")
    ours = Path(sys.prefix) / "lib" / own.parent.name / "site-packages"
    (own / "zz_torch.pth").write_text(f"{ours}\n", encoding="utf-8")
    return place / "bin" / "infinity_emb"


@contextlib.contextmanager
def vllm() -> Iterator[Running]:
    """vLLM's own server with the same model, eager as the processor wants it."""
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
        yield Running(endpoint, home)


SERVERS: Mapping[str, Callable[[], AbstractContextManager[Running]]] = {
    "tandem": tandem(),
    SPLIT: tandem(replicas=len(os.sched_getaffinity(0)), threads=1),
    "infinity-bf16": infinity("bfloat16"),
    "infinity-fp32": infinity("float32"),
    "vllm": vllm,
}
