"""Cluster under test: two replicas of each deployment, its processes, updates and scaling."""

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.endpoint import TargetError
from benchmarks.ports import free_ports
from benchmarks.targets.home import ROOT, Home
from benchmarks.targets.tandem import TANDEM
from cluster.config.file import IMPORT_PATH
from cluster.launch import processes
from cluster.launch.serve_api import APPLICATIONS, ApplicationStatus, DeploymentStatus, ServeApi
from cluster.launch.state import ClusterState, load
from cluster.models import store
from resilience.accounting import count_restarted
from resilience.inside.fault_points import Control, write_control
from tests.cluster.tiny_llama import make_tiny_llama

MODEL, CLASSIFIER = "chat", "sentiment"
ROUTER, GENERATOR = "router", f"generator-{MODEL}"
CLASSIFIERS = f"classifier-{CLASSIFIER}"
SMALL_MODEL = "smollm2-135m-instruct"
NUM_REPLICAS = 2
"""Replicas of each deployment."""
DISK_BYTES = 256 * 1024**2
"""Size of the file system with state and logs, if there is one."""
START_S = 600.0
RECOVERY_S = 180.0
"""Time for a replica with the real engine to start on a busy machine."""
POLL_S = 0.1
KILL_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Setup:
    """Engine and model of the generators."""

    engine: str = "sim"
    """``sim``; ``vllm`` with a small model; ``vllm-tiny`` with a random one, whose steps take
    milliseconds, so that waits are those of Tandem."""
    tensor_parallel: int = 1
    has_disk: bool = False
    """True if state and logs are on a small file system of their own; needs root."""

    @property
    def has_vllm(self) -> bool:
        return self.engine != "sim"

    def generator(self, model: str) -> dict[str, Any]:
        """Return the configuration of the generators; ``model`` is that of vLLM."""
        common = {
            "name": MODEL,
            "engine": "vllm" if self.has_vllm else "sim",
            "routing": "least-load",
            "replicas": {"min": NUM_REPLICAS, "max": NUM_REPLICAS},
        }
        if not self.has_vllm:
            sim = {"decode_s_per_token": 0.1}
            return {**common, "model": "sim", "sim": sim, "resources": {"cpus": 0.05}}
        return {
            **common,
            "model": model,
            "max_model_len": 512,
            # In bfloat16, another batch often changes the numbers enough to change a token.
            "dtype": "float32",
            "kv_cache_memory_bytes": 128 * 1024**2,
            "tensor_parallel_size": self.tensor_parallel,
            "resources": {"cpus": 0.2 / self.tensor_parallel},
        }


def serve_config(setup: Setup, model: str, ports: Sequence[int]) -> dict[str, Any]:
    """Return the configuration of the cluster; ``ports`` are those of HTTP, GCS and dashboard."""
    replicas = {"min": NUM_REPLICAS, "max": NUM_REPLICAS}
    small = {"replicas": replicas, "resources": {"cpus": 0.05}}
    classifier = {"name": CLASSIFIER, "model": "sentiment-minilm", "threads": 1, **small}
    args = {
        "generators": [setup.generator(model)],
        "classifiers": [classifier],
        "router": {**small, "max_connections_per_address": 4096},
        "cluster": {"ray_port": ports[1], "dashboard_port": ports[2]},
    }
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": ports[0]},
        "applications": [application],
    }


class Testbed:
    """Running cluster; only processes that carry its id are touched."""

    def __init__(self, home: Path, state: ClusterState, config: dict[str, Any]) -> None:
        self.home = home
        self.state = state
        self._config = config

    # -- replicas and processes ---------------------------------------------------------------

    def deployments(self) -> list[DeploymentStatus]:
        """Return the deployments, also while some are not healthy."""
        application = self._application()
        return list(application.deployments) if application else []

    def _application(self) -> ApplicationStatus | None:
        with ServeApi(self.state.dashboard_url) as api:
            return api.application(self.state.application)

    def replicas(self) -> dict[str, str]:
        """Return the deployment of each running replica, by the replica's id."""
        return {
            replica.id: deployment.name
            for deployment in self.deployments()
            for replica in deployment.replicas
            if replica.state == "RUNNING"
        }

    def is_healthy(self) -> bool:
        """Return True if all deployments have their replicas and the routers can reach them."""
        application = self._application()
        if application is None or not application.running:
            return False
        if any(one.running != one.target for one in application.deployments):
            return False
        try:
            ready = httpx.get(f"{self.state.http_url}/ready", timeout=5, trust_env=False)
            pools = ready.json()["pools"].values()
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        return all(pool["ready"] >= NUM_REPLICAS for pool in pools)

    def wait_healthy(self, timeout_s: float = RECOVERY_S) -> bool:
        """Wait until the cluster is healthy; return False after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def owned(self) -> list[psutil.Process]:
        return [
            member.process
            for member in processes.find(self.home)
            if member.cluster_id == self.state.cluster_id
        ]

    def titled(self, title: str) -> psutil.Process:
        """Return the newest process with ``title`` in its command line.

        Raises:
            TargetError: There is no such process.
        """
        found = []
        for process in self.owned():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()) or process.name().startswith(title):
                    found.append((process.create_time(), process.pid, process))
        if not found:
            raise TargetError(f"Found no process {title!r}.")
        return max(found)[2]

    def replica(self, deployment: str, rng: random.Random) -> psutil.Process:
        """Return the process of a random running replica.

        Raises:
            TargetError: No replica runs.
        """
        if not (pids := self.pids(deployment)):
            raise TargetError(f"No replica of {deployment} runs.")
        return psutil.Process(rng.choice(sorted(pids)))

    def pids(self, deployment: str = "") -> set[int]:
        """Return the processes of all running replicas, or of those of one deployment."""
        return {
            replica.pid
            for one in self.deployments()
            for replica in one.replicas
            if deployment in ("", one.name) and replica.state == "RUNNING" and replica.pid
        }

    def engine_core(self, rng: random.Random) -> psutil.Process:
        """Return the engine process of a random vLLM replica.

        Raises:
            TargetError: There is no such process.
        """
        pid = self.replica(GENERATOR, rng).pid
        for process in self.owned():
            with contextlib.suppress(psutil.Error):
                is_child = process.ppid() == pid
                if is_child and "resource_tracker" not in " ".join(process.cmdline()):
                    return process
        raise TargetError(f"Found no engine process of the replica {pid}.")

    # -- changes ------------------------------------------------------------------------------

    def control(self, control: Control) -> None:
        """Ask the processes of the cluster for faults (``resilience.inside``)."""
        write_control(self.home, control)

    def deploy(self, **generator: Any) -> None:
        """Change fields of the generator pool, as ``serve deploy`` does; return before it is done.

        Raises:
            TargetError: Serve rejected the configuration.
        """
        self._config["applications"][0]["args"]["generators"][0].update(generator)
        url = f"{self.state.dashboard_url}{APPLICATIONS}"
        answer = httpx.put(url, json=self._config, timeout=60, trust_env=False)
        if not answer.is_success:
            raise TargetError(f"Serve rejected the configuration: {answer.text[:500]}")


def count_replaced(before: Mapping[str, str], testbed: Testbed) -> int:
    """Return the number of replicas that were replaced since ``before``."""
    return count_restarted(before, testbed.replicas())


@contextlib.contextmanager
def start(setup: Setup) -> Iterator[Testbed]:
    """Start the cluster and yield it; stop it and delete its files on exit.

    Raises:
        TargetError: It did not start.
    """
    with home_directory(setup.has_disk) as path, model_of(setup) as model:
        home = Home(path)
        (path / "models").symlink_to(store.models_dir())
        http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
        config = serve_config(setup, model, (http, gcs, dashboard))
        file = path / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        inside = Path(__file__).parent / "inside" / "path"
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, (inside, ROOT, ROOT / "scripts"))),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            **({"RAY_TMPDIR": str(path / "ray")} if setup.has_disk else {}),
            # Threads of two engines that wait for each other on the same cores slow both down.
            **({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if setup.has_vllm else {}),
            "OMP_NUM_THREADS": "1",
        }
        try:
            home.run(
                TANDEM, "up", "-d", "--config", file, timeout_s=START_S, environment=environment
            )
            state = load(path)
            assert state is not None  # written by `tandem up`
            testbed = Testbed(path, state, config)
            if not testbed.wait_healthy():
                home.fail(f"The cluster was not healthy within {RECOVERY_S:g} s.")
            yield testbed
        finally:
            home.stop()


@contextlib.contextmanager
def model_of(setup: Setup) -> Iterator[str]:
    """Yield the model of the generators."""
    if setup.engine != "vllm-tiny":
        yield SMALL_MODEL
        return
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_llama(Path(directory), store.resolve(SMALL_MODEL))
        yield directory


@contextlib.contextmanager
def home_directory(has_disk: bool) -> Iterator[Path]:
    """Yield a new directory; with ``has_disk``, it is a file system of ``DISK_BYTES``."""
    # Ray's sockets are in it, and their paths have at most 107 bytes.
    path = Path(f"/tmp/tandem-test-{os.getpid()}")
    path.mkdir(mode=0o700)
    try:
        if has_disk:
            size = f"size={DISK_BYTES},mode=700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(path)], check=True)
        yield path
    finally:
        if has_disk:
            subprocess.run(["umount", "-l", str(path)], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=False)
