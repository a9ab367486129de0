"""``stop``: end everything that ``start`` started, and nothing else; also after a crash."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import processes, state
from cluster.launch.auth import ray_token
from cluster.launch.environment import sockets_dir
from cluster.launch.serve_api import ServeApi

TERM_S = 1.0
"""After SIGTERM. Nothing that is left by then has anything to lose: the replicas have drained, and
Ray keeps no state on disk; its raylet would take 10 s."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """What ``stop`` did."""

    drained: bool
    """Whether every replica finished its requests first."""
    ended: processes.Ended
    seconds: float


def stop(home: Path, *, drain_s: float) -> Stopped | None:
    """End the cluster of ``home``; None where none of its processes was found.

    Args:
        home: What the cluster was started with.
        drain_s: How long replicas may take to finish their requests; 0 ends them at once.

    Raises:
        StartError: a process cannot be ended.
    """
    began = time.monotonic()
    running = state.load(home)
    owned = processes.find(home)
    drained = False
    if drain_s > 0 and running and processes.has_head(owned):
        with ServeApi(running.dashboard_url, ray_token(os.environ)) as api:
            drained = api.drain(drain_s)
    ended = processes.end(home, grace_s=TERM_S)
    for cluster_id in {o.cluster_id for o in owned} | ({running.cluster_id} if running else set()):
        shutil.rmtree(sockets_dir(cluster_id), ignore_errors=True)
    state.forget(home)
    if not owned:
        return None
    return Stopped(drained, ended, time.monotonic() - began)
