"""Isolated clusters for tests. Standard library only: the clients' environment imports it, too."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ports import free_ports

ROOT = Path(__file__).parents[1]
TANDEM = Path(sys.executable).with_name("tandem")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_until(
    condition: Callable[[], object],
    timeout_s: float,
    event: str,
    *,
    ignored: tuple[type[Exception], ...] = (),
) -> None:
    """Wait until ``condition()`` is true, or fail; an ``ignored`` exception counts as false."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(*ignored):
            if condition():
                return
        assert time.monotonic() < deadline, f"{event} took longer than {timeout_s:g} s"
        time.sleep(0.2)


@dataclass(frozen=True)
class RunningCluster:
    """Cluster that shares no ports or state with others on this machine."""

    home: Path
    env: dict[str, str]
    http_url: str
    ray_address: str
    executable: Path = TANDEM
    """The ``tandem`` command."""

    def tandem(self, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the command line against this cluster."""
        return subprocess.run(
            [self.executable, *args],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def up(self, *args: str) -> None:
        """Start the cluster; stop what has started if that fails."""
        try:
            done = self.tandem("up", "-d", *args, timeout_s=900)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        except BaseException:  # above all pytest's timeout
            self.tandem("down")
            raise

    def down(self) -> None:
        done = self.tandem("down", timeout_s=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def status(self) -> Any:
        done = self.tandem("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def deploy(self, config: dict[str, Any]) -> None:
        """Change the applications with ``serve deploy``; returns before the change is complete."""
        port = int(self.http_url.rsplit(":", 1)[1])
        changed = {**config, "http_options": {**config["http_options"], "port": port}}
        file = self.home / "deployed.yaml"
        file.write_text(json.dumps(changed), encoding="utf-8")
        command = [self.executable.with_name("serve"), "deploy", "-a", self.dashboard_url, file]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def deployments(self) -> dict[str, list[dict[str, Any]]]:
        """Return Serve's description of the replicas of each deployment.

        The answer of ``tandem status`` takes a second of a CPU, which what is waited for lacks.
        """
        url = f"{self.dashboard_url}/api/serve/applications/"
        found: dict[str, Any] = {}

        def are_listed() -> bool:  # not while Serve builds an application
            with _OPENER.open(url, timeout=60) as answer:
                application = json.load(answer)["applications"].get("tandem", {})
            found.update(application.get("deployments", {}))
            return bool(found)

        wait_until(are_listed, 120, "building the application", ignored=(OSError,))
        return {name: deployment["replicas"] for name, deployment in found.items()}

    def replicas(self) -> dict[str, tuple[str, str]]:
        """Return the deployment and the state of each replica by its id."""
        return {
            replica["replica_id"]: (name, replica["state"])
            for name, replicas in self.deployments().items()
            for replica in replicas
        }

    def all_run(self) -> bool:
        """Return True if no replica is starting or stopping."""
        return {state for _, state in self.replicas().values()} == {"RUNNING"}

    @property
    def dashboard_url(self) -> str:
        state = json.loads((self.home / "run" / "cluster.json").read_text(encoding="utf-8"))
        return str(state["dashboard_url"])


class IsolatedHome(NamedTuple):
    """Environment, ``--set`` options and addresses of an isolated cluster."""

    env: dict[str, str]
    settings: list[str]
    http_url: str
    ray_address: str


def isolated_home(home: Path, **variables: str) -> IsolatedHome:
    """Choose free ports and make the environment, with ``variables``, for a cluster."""
    http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
    env = {
        **os.environ,
        **variables,
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
