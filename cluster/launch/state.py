"""What ``up`` leaves on disk for ``status``, ``down`` and the client: ``run/cluster.json``."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.errors import StartError


@dataclass(frozen=True, slots=True)
class ClusterState:
    """A cluster that was started."""

    cluster_id: str
    application: str
    http_url: str
    dashboard_url: str
    ray_address: str
    """What other Ray jobs give to ``ray.init``."""
    config_path: str
    started_at: float
    """Unix time."""
    prometheus_url: str | None = None
    """None: it was started without monitoring."""
    overrides: list[str] = field(default_factory=list)
    """What ``--set`` changed of the configuration."""

    @property
    def uptime_s(self) -> float:
        """Seconds since the start began."""
        return max(0.0, time.time() - self.started_at)


def run_dir(home: Path) -> Path:
    """Where a cluster's own files lie: its state, and the log of its start."""
    return home / "run"


def _path(home: Path) -> Path:
    return run_dir(home) / "cluster.json"


def save(home: Path, state: ClusterState) -> None:
    """Write the state, whole or not at all."""
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(f"{json.dumps(asdict(state), indent=2)}\n", encoding="utf-8")
    scratch.replace(path)


def load(home: Path) -> ClusterState | None:
    """The state that the last ``up`` wrote, or None; the cluster may be dead by now.

    Raises:
        StartError: the file may not be read.
    """
    try:
        return ClusterState(**json.loads(_path(home).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none, or one of another version
        return None
    except OSError as error:
        raise StartError(f"{_path(home)} cannot be read: {error.strerror}") from None


def forget(home: Path) -> None:
    """Remove the state."""
    with contextlib.suppress(FileNotFoundError):
        _path(home).unlink()
