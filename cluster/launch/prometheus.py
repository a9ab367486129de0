"""Start of Prometheus next to a cluster, with its files in ``<home>/monitoring``.

The process has the cluster's id in its environment, so ``stop`` ends it too; its data stays.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.errors import StartError
from cluster.launch.private_files import write_private
from cluster.launch.starter import HOUSEKEEPING_NICE
from cluster.launch.starter_process import last_line
from cluster.launch.state import ClusterState
from cluster.monitoring.prometheus import RULES, Targets, configuration

PACKAGE = "prometheus"  # of Debian and Ubuntu
RETENTION_TIME = "15d"
RETENTION_SIZE = "2GB"


@dataclass(frozen=True, slots=True)
class MonitoringProcess:
    """Started Prometheus, or Grafana or its stand-in."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def check(self) -> None:
        """Raise StartError with the last line of the log if the process has ended."""
        if self.process.poll() is not None:
            reason = f"{last_line(self.log)} (log: {self.log})"
            raise StartError(f"{self.name} exited during its start: {reason}")

    def detach(self) -> None:
        """Give up the process, which ends with the cluster."""
        self.process.returncode = 0


def spawn(
    name: str, command: Sequence[str], log: Path, variables: Mapping[str, str]
) -> MonitoringProcess:
    """Start a process that outlives this one, at a lower priority than serving."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["nice", "-n", str(HOUSEKEEPING_NICE), *command], env=dict(variables), cwd=log.parent,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return MonitoringProcess(name, process, log)


def executable() -> str:
    """Return the path of Prometheus.

    Raises:
        StartError: Prometheus is not installed.
    """
    if (found := shutil.which("prometheus")) is None:
        raise StartError(
            f"--monitoring needs Prometheus, which is not installed. On Debian and Ubuntu, run "
            f"`apt-get install --no-install-recommends {PACKAGE}`."
        )
    return found


def monitoring_dir(home: Path) -> Path:
    return home / "monitoring"


def ray_dashboards_dir(home: Path) -> Path:
    """Return the directory to which Ray writes its dashboards for Grafana."""
    return monitoring_dir(home) / "ray-dashboards"


def ray_variables(home: Path, url: str) -> dict[str, str]:
    """Return the variables with which Ray's dashboard finds this Prometheus."""
    return {
        "RAY_PROMETHEUS_HOST": url,
        "RAY_PROMETHEUS_NAME": "Prometheus",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(ray_dashboards_dir(home)),
    }


def start(
    home: Path, cluster: ClusterState, variables: Mapping[str, str], *, requires_keys: bool
) -> MonitoringProcess:
    """Start Prometheus on loopback, with ``variables`` as its environment.

    Raises:
        StartError: Prometheus is not installed.
    """
    assert cluster.prometheus_url is not None
    directory = monitoring_dir(home)
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "prometheus.yml"
    rules = sorted(str(path) for path in RULES.glob("*.yml"))
    targets = scrape_targets(cluster, home, requires_keys=requires_keys)
    config.write_text(configuration(targets, rules), encoding="utf-8")
    command = [
        executable(),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION_TIME}",
        f"--storage.tsdb.retention.size={RETENTION_SIZE}",
        f"--web.listen-address={urlsplit(cluster.prometheus_url).netloc}",
        "--log.level=warn",
    ]
    return spawn("Prometheus", command, directory / "prometheus.log", variables)


def scrape_targets(cluster: ClusterState, home: Path, *, requires_keys: bool) -> Targets:
    """Return the targets; the router only if it requires no key or ``TANDEM_API_KEY`` has one."""
    directory = monitoring_dir(home)
    key = os.environ.get("TANDEM_API_KEY") if requires_keys else None
    return Targets(
        dashboard=cluster.dashboard_url,
        ingress=urlsplit(cluster.http_url).netloc if key or not requires_keys else None,
        token_file=write_secret(directory / "ray-token", cluster.token(home)),
        key_file=write_secret(directory / "router-key", key),
        uses_tls=urlsplit(cluster.http_url).scheme == "https",
    )


def write_secret(path: Path, token: str | None) -> str | None:
    """Write a secret to a file that only the user can read; return None without a secret."""
    if not token:
        return None
    write_private(path, token)
    return str(path)
