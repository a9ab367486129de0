"""The servers that ``bench classify`` compares: each a context manager, all with one model."""

import contextlib
import hashlib
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.targets.home import Home, free_ports, new_home
from cluster.models.store import home as cache
from cluster.models.store import models_dir

MODEL = "sentiment-minilm"
READY_S = 300.0
INFINITY = "infinity-emb[server]==0.0.78"
INFINITY_WANTS = (INFINITY, "transformers<5", "sentence-transformers<5.2")


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers ``/classify``."""

    endpoint: Endpoint
    home: Home
    ray_address: str = ""


@contextlib.contextmanager
def tandem() -> Iterator[Server]:
    """The cluster as ``tandem up`` starts it, with one classifier and no generator."""
    key = secrets.token_urlsafe(24)
    http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
    args: dict[str, object] = {
        "classifiers": [{"name": MODEL, "model": MODEL, "replicas": {"min": 1, "max": 1}}],
        "router": {
            "api_keys_sha256": [hashlib.sha256(key.encode()).hexdigest()],
            "replicas": {"min": 1, "max": 1},
        },
        "cluster": {"ray_port": gcs, "dashboard_port": dashboard},
    }
    with new_home("classify") as home:
        (home.path / "models").symlink_to(models_dir())
        config = home.path / "config.yaml"
        config.write_text(_serve_config(http, args), encoding="utf-8")
        home.run(
            Path(sys.executable).with_name("tandem"), "up", "-d", "--config", config,
            timeout_s=READY_S,
            environment={
                "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
                "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            },
        )  # fmt: skip
        endpoint = Endpoint(http, MODEL, {"authorization": f"Bearer {key}"})
        home.wait_ready(endpoint, READY_S)
        yield Server(endpoint, home, f"127.0.0.1:{gcs}")


def _serve_config(port: int, args: Mapping[str, object]) -> str:
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
    }
    return yaml.safe_dump(
        {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [application],
        }
    )


def infinity(dtype: str) -> Callable[[], AbstractContextManager[Server]]:
    """Infinity with its PyTorch engine, in one type."""

    @contextlib.contextmanager
    def server() -> Iterator[Server]:
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
            yield Server(endpoint, home)

    return server


def infinity_installed() -> Path:
    """Infinity's program, installed now if it is not there yet.

    Its environment has everything of its own but PyTorch, which it shares with this one: the same
    kernels for both.
    """
    place = cache() / "bench" / "infinity-emb-0.0.78"
    binary = place / "bin" / "infinity_emb"
    if not binary.exists():
        print(f"bench: installing {INFINITY}", file=sys.stderr)
        place.parent.mkdir(parents=True, exist_ok=True)
        _install(place)
    return binary


def _install(place: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    python = place / "bin" / "python"
    without_torch = place / "without-torch.txt"
    try:
        _run(uv, "venv", "-q", "--clear", "--python", sys.executable, place)
        without_torch.write_text('torch; python_version < "0"\n', encoding="utf-8")
        options = ("--python", python, "--overrides", without_torch)
        _run(uv, "pip", "install", "-q", *options, *INFINITY_WANTS)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise TargetError(f"{INFINITY} cannot be installed: {error.stderr}") from None
    (own,) = (place / "lib").glob("python*/site-packages")
    ours = Path(sys.prefix) / "lib" / own.parent.name / "site-packages"
    (own / "zz_torch.pth").write_text(f"{ours}\n", encoding="utf-8")


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def vllm() -> Iterator[Server]:
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
        yield Server(endpoint, home)


SERVERS: Mapping[str, Callable[[], AbstractContextManager[Server]]] = {
    "tandem": tandem,
    "infinity-bf16": infinity("bfloat16"),
    "infinity-fp32": infinity("float32"),
    "vllm": vllm,
}
