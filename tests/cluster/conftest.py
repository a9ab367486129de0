"""Real clusters for the tests: real Ray, real vLLM, the default models."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from benchmarks.targets.home import free_ports
from cluster.models import store

ROOT = Path(__file__).parents[2]
TANDEM = Path(sys.executable).with_name("tandem")


@dataclass(frozen=True)
class RunningCluster:
    """Cluster that shares no ports or state with others on this machine."""

    home: Path
    env: dict[str, str]
    http_url: str
    ray_address: str

    def tandem(self, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the command line against this cluster."""
        return subprocess.run(
            [TANDEM, *args],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def status(self) -> Any:
        done = self.tandem("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def sim_generator(**fields: Any) -> dict[str, Any]:
    """Return a generator pool with the simulated engine, which needs almost no CPU."""
    return {
        "name": "sim",
        "model": "sim",
        "engine": "sim",
        "resources": {"cpus": 0.1},
        **fields,
    }


def router_config(num: int, **fields: Any) -> dict[str, Any]:
    """Return a router configuration with a fixed number of replicas."""
    return {"replicas": {"min": num, "max": num}, "resources": {"cpus": 0.1}, **fields}


def serve_config(*more: dict[str, Any], **args: Any) -> dict[str, Any]:
    """Return a full configuration: Tandem's application with ``args``, and more applications."""
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application, *more],
    }


class IsolatedHome(NamedTuple):
    """Environment, ``--set`` options and addresses of an isolated cluster."""

    env: dict[str, str]
    settings: list[str]
    http_url: str
    ray_address: str


def isolated_home(home: Path) -> IsolatedHome:
    """Choose free ports and make the environment for a cluster in ``home``."""
    http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
    env = {
        **os.environ,
        "TANDEM_HOME": str(home),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    values = {
        "http_options.port": http,
        "cluster.ray_port": gcs,
        "cluster.dashboard_port": dashboard,
    }
    settings = [word for path, port in values.items() for word in ("--set", f"{path}={port}")]
    # Ray replaces 127.0.0.1 by the machine's outward address, where this Ray does not listen.
    return IsolatedHome(env, settings, f"http://127.0.0.1:{http}", f"LOCALHOST:{gcs}")


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that starts an isolated cluster; only the models are shared."""

    def make(*args: str) -> RunningCluster:
        home = tmp_path_factory.mktemp("home")
        store.models_dir().mkdir(parents=True, exist_ok=True)
        (home / "models").symlink_to(store.models_dir())
        env, settings, http_url, ray_address = isolated_home(home)
        running = RunningCluster(home, env, http_url, ray_address)
        try:
            done = running.tandem("up", "-d", *settings, *args, timeout_s=900)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        except BaseException:  # above all pytest's timeout
            running.tandem("down")
            raise
        return running

    return make


@pytest.fixture(scope="module")
def sim_cluster(
    request: pytest.FixtureRequest, make_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """Start a cluster with the configuration returned by the test module's ``config()``."""
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(request.module.config()), encoding="utf-8")
    running: RunningCluster = make_cluster("--config", str(file))
    yield running
    assert running.tandem("down").returncode == 0


@pytest.fixture(scope="session")
def cluster(make_cluster: Any) -> Iterator[RunningCluster]:
    """Start the default deployment: SmolLM2 on vLLM, the sentiment classifier, one router."""
    running: RunningCluster = make_cluster()
    yield running
    done = running.tandem("down")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
