"""State of a cluster: the file that ``up`` writes (``run/cluster.json``), and its live status."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.errors import StartError
from cluster.launch import processes
from cluster.launch.auth import ray_token, stored_token
from cluster.launch.private_files import write_private
from cluster.launch.serve_api import ApplicationStatus, ServeApi


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Addresses and configuration of a started cluster."""

    cluster_id: str
    application: str
    http_url: str
    dashboard_url: str
    ray_address: str
    """Value of ``RAY_ADDRESS`` for other Ray jobs."""
    config_path: str
    started_at: float
    """Unix time."""
    prometheus_url: str | None = None
    """None without ``--monitoring``."""
    grafana_url: str | None = None
    """Grafana or its stand-in; None without ``--monitoring``, or if the user named another."""
    grafana_is_stand_in: bool = False
    overrides: list[str] = field(default_factory=list)
    """``--set`` arguments."""
    is_head: bool = True
    """False on a node that joined a cluster."""
    address: str | None = None
    """Address of this node; None if the cluster is confined to loopback."""
    keys_in_cluster: bool = False
    """True on a head whose key file is copied to the cluster."""
    redis: str | None = None
    """URL of the Redis that has the GCS' state, with the password; None without one."""

    def token(self, home: Path) -> str | None:
        """Return Ray's token: on several nodes the one in ``home``, else by Ray's own rules."""
        return ray_token(os.environ) if self.address is None else stored_token(home)

    @property
    def uptime_s(self) -> float:
        return max(0.0, time.time() - self.started_at)


def run_dir(home: Path) -> Path:
    return home / "run"


def _path(home: Path) -> Path:
    return run_dir(home) / "cluster.json"


def save(home: Path, state: ClusterState) -> None:
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    write_private(scratch, f"{json.dumps(asdict(state), indent=2)}\n")
    scratch.replace(path)


def load(home: Path) -> ClusterState | None:
    """Return the state written by the last ``up``, or None. The cluster may have died since.

    Raises:
        StartError: the file cannot be read.
    """
    try:
        return ClusterState(**json.loads(_path(home).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # missing, or written by another version
        return None
    except OSError as error:
        raise StartError(f"{_path(home)} cannot be read: {error.strerror}") from None


def forget(home: Path) -> None:
    _path(home).unlink(missing_ok=True)


def is_alive(owned: list[processes.ClusterProcess], known: ClusterState | None) -> bool:
    """Return True if Ray runs on this node: a raylet, and on the head also the GCS."""
    needed = processes.HEAD if known is None or known.is_head else processes.NODE
    return {process.name for process in owned} >= needed


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Live status of a cluster."""

    state: ClusterState | None
    """None if processes exist without a state file."""
    alive: bool
    """See ``is_alive``."""
    num_processes: int
    rss_bytes: int
    application: ApplicationStatus | None
    """None if Ray's dashboard does not respond."""


def read_status(home: Path) -> ClusterStatus | None:
    """Return the status of the cluster with this home; None if no process of it exists."""
    owned = processes.find(home)
    if not owned:
        return None
    known = load(home)
    alive = is_alive(owned, known)
    application = None
    if known and alive:
        with ServeApi(known.dashboard_url, known.token(home)) as api:
            application = api.application(known.application)
    return ClusterStatus(known, alive, len(owned), processes.rss_bytes(owned), application)
