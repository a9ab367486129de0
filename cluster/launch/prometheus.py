"""Starts Debian's Prometheus beside a cluster.

Its process carries the cluster's mark, so ``stop`` ends it with the rest; its data stays. Owns
``monitoring`` below the home.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.config.file import LoadedConfig
from cluster.errors import StartError
from cluster.launch.auth import ray_token
from cluster.launch.starter import HOUSEKEEPING_NICE
from cluster.launch.state import ClusterState
from cluster.monitoring.prometheus import RULES, Targets, configuration

PACKAGE = "prometheus"
"""Debian's and Ubuntu's."""
RETENTION_TIME = "15d"
RETENTION_SIZE = "2GB"


@dataclass(frozen=True, slots=True)
class Running:
    """A Prometheus that was started."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def check(self) -> None:
        """Raise StartError, with its last words, if it has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = lines[-1] if lines else "it said nothing"
            raise StartError(f"Prometheus ended at once: {said} (log: {self.log})")

    def leave(self) -> None:
        """Let it be: it ends with the cluster, and nobody waits for it."""
        self.process.returncode = 0


def executable() -> str:
    """Where Prometheus is.

    Raises:
        StartError: it is not installed.
    """
    if (found := shutil.which("prometheus")) is None:
        raise StartError(
            f"--monitoring needs Prometheus, which is not installed; on Debian and Ubuntu: "
            f"apt-get install --no-install-recommends {PACKAGE}"
        )
    return found


def monitoring_dir(home: Path) -> Path:
    """Where Prometheus' configuration, log and data lie."""
    return home / "monitoring"


def ray_variables(home: Path, url: str) -> dict[str, str]:
    """How Ray's dashboard finds this Prometheus, and where it writes its own Grafana dashboards."""
    return {
        "RAY_PROMETHEUS_HOST": url,
        "RAY_PROMETHEUS_NAME": "Prometheus",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(monitoring_dir(home) / "ray-dashboards"),
    }


def start(
    loaded: LoadedConfig, home: Path, cluster: ClusterState, variables: Mapping[str, str]
) -> Running:
    """Start Prometheus on loopback for ``cluster``, whose environment is ``variables``.

    Raises:
        StartError: it is not installed.
    """
    assert cluster.prometheus_url is not None
    directory = monitoring_dir(home)
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "prometheus.yml"
    rules = sorted(str(path) for path in RULES.glob("*.yml"))
    config.write_text(configuration(_targets(loaded, cluster, directory), rules), encoding="utf-8")
    command = [
        *("nice", "-n", str(HOUSEKEEPING_NICE)),  # it yields to what serves
        executable(),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION_TIME}",
        f"--storage.tsdb.retention.size={RETENTION_SIZE}",
        f"--web.listen-address={urlsplit(cluster.prometheus_url).netloc}",
        "--log.level=warn",
    ]
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(variables), cwd=directory, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Running(process, log)


def _targets(loaded: LoadedConfig, cluster: ClusterState, directory: Path) -> Targets:
    requires_keys = loaded.config.router.requires_keys
    return Targets(
        dashboard=cluster.dashboard_url,
        ingress=None if requires_keys else urlsplit(cluster.http_url).netloc,
        token_file=token_file(directory),
    )


def token_file(directory: Path) -> str | None:
    """A file for the user alone with Ray's token; None where Ray asks for none."""
    if (token := ray_token(os.environ)) is None:
        return None
    path = directory / "ray-token"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(token, encoding="utf-8")
    return str(path)
