"""``status``: what runs now, from the state on disk, the process table and Serve."""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import processes, state
from cluster.launch.auth import ray_token
from cluster.launch.serve_api import ApplicationStatus, ServeApi


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """A cluster as it is now."""

    state: state.ClusterState | None
    """None: the file is gone, but processes are there."""
    alive: bool
    """Whether Ray's GCS runs; without it the rest is what a crash left."""
    num_processes: int
    rss_bytes: int
    """Memory of all processes; what they share counts in each."""
    application: ApplicationStatus | None
    """None: Ray's dashboard does not tell."""


def status(home: Path) -> ClusterStatus | None:
    """The cluster of ``home``; None where there is none."""
    owned = processes.find(home)
    if not owned:
        return None
    known = state.load(home)
    alive = processes.has_head(owned)
    application = None
    if known and alive:
        with ServeApi(known.dashboard_url, ray_token(os.environ)) as api:
            application = api.application(known.application)
    return ClusterStatus(known, alive, len(owned), processes.rss_bytes(owned), application)
