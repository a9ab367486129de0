"""Isolated clusters for tests. Standard library only: the clients' environment imports it, too."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ports import free_ports

ROOT = Path(__file__).parents[1]
TANDEM = Path(sys.executable).with_name("tandem")


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
        done = self.tandem("down")
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
        dashboard_url = self.status()["state"]["dashboard_url"]
        command = [self.executable.with_name("serve"), "deploy", "-a", dashboard_url, file]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def replicas(self) -> dict[str, tuple[str, str]]:
        """Return the deployment and the state of each replica by its id."""
        return {
            replica["id"]: (deployment["name"], replica["state"])
            for deployment in self.status()["application"]["deployments"]
            for replica in deployment["replicas"]
        }


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
