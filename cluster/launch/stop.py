"""Stop of a cluster, also after a crash."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.launch import processes, state
from cluster.launch.environment import sockets_dir
from cluster.launch.redis import delete_cluster, parse_redis
from cluster.launch.serve_api import ServeApi

# Time from SIGTERM to SIGKILL. Replicas have drained by then and Ray keeps no state on disk; a
# regular exit of the raylet would take 10 s.
TERM_S = 1.0


@dataclass(frozen=True, slots=True)
class StopResult:
    """Result of a stop."""

    drained: bool
    """True if all requests finished before the end."""
    cluster_continues: bool
    """True if only this node ended, and its cluster continues."""
    ended: processes.EndedProcesses
    seconds: float


def stop(home: Path, *, drain_s: float, end_cluster: bool = False) -> StopResult | None:
    """End all processes of the clusters started with ``home``; return None if there are none.

    Running requests get ``drain_s`` seconds to finish; 0 cancels them. On a node that joined a
    cluster, only this node ends, and other replicas continue its answers. A head with Redis behaves
    the same unless ``end_cluster``, which also deletes the state. Without a drain, or
    if the head is dead, nodes that joined then serve for up to ``HEAD_TIMEOUT_S``.

    Raises:
        StartError: a process cannot be ended, or Redis does not answer.
    """
    began = time.monotonic()
    running = state.load(home)
    owned = processes.find(home)
    drained = False
    redis = running.redis if running else None
    cluster_continues = running is not None and (
        not running.is_head or bool(redis and not end_cluster)
    )
    if drain_s > 0 and running and not cluster_continues and state.is_alive(owned, running):
        with ServeApi(running.dashboard_url, running.token(home)) as api:
            drained = api.drain(drain_s)
    ended = processes.end_all(home, grace_s=TERM_S)
    cluster_ids = {process.cluster_id for process in owned}
    for cluster_id in cluster_ids | ({running.cluster_id} if running else set()):
        shutil.rmtree(sockets_dir(cluster_id), ignore_errors=True)
    if redis and end_cluster:
        delete_cluster(parse_redis(redis))
    if end_cluster or not redis:  # else a later `tandem down` must find the state in Redis
        state.forget(home)
    if not owned:
        return None
    return StopResult(drained, cluster_continues, ended, time.monotonic() - began)
