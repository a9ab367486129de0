"""Cluster with one routing policy, ours or a peer's, for ``bench routing --live``."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import httpx

from benchmarks.endpoint import TargetError
from benchmarks.routing.traces import PEERS
from benchmarks.targets.running import SIM_MODEL
from benchmarks.targets.tandem import ExtraApplication, tandem_with_pools
from cluster.config import RoutingPolicy
from cluster.gateway.pools import replica_set
from cluster.launch.log_files import REQUEST_LOGS, log_directory
from cluster.routing import Policy, PrefixIndex

REPLICAS = 8
OUR_POLICIES: tuple[str, ...] = get_args(RoutingPolicy)
ROUTER = {"log_requests_per_s": 1000, "queue_timeout_s": 300, "resources": {"cpus": 0.1}}
READY_S = 120.0
LOG_TIMEOUT_S = 10.0
"""Time until the last request is in the router's log."""
POLL_S = 0.2
PEER_PATH, PEER_APP = "/peer", "benchmarks.routing.peer_app:build"


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """Running cluster and its request logs."""

    url: str
    model: str
    headers: Mapping[str, str]
    logs: Path

    def wait_ready(self) -> None:
        """Wait until the router has a link to every replica.

        Raises:
            TargetError: It has not within ``READY_S``.
        """
        deadline_s = time.monotonic() + READY_S
        while True:
            pool = httpx.get(f"{self.url}/ready").json()["pools"][self.model]
            if pool["ready"] == REPLICAS:
                return
            if time.monotonic() > deadline_s:
                raise TargetError(f"{self.url}/ready reports {pool} after {READY_S:g} s.")
            time.sleep(POLL_S)

    def read_log(self, trace: str, count: int) -> list[dict[str, Any]]:
        """Return the router's log lines of the ``count`` requests of a replayed trace.

        Raises:
            TargetError: The number of lines differs.
        """
        deadline_s = time.monotonic() + LOG_TIMEOUT_S
        while len(lines := self._read_lines(f"{trace}-")) < count and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if len(lines) != count:
            raise TargetError(
                f"{self.logs} has {len(lines)} requests of {trace}, expected {count}."
            )
        return lines

    def _read_lines(self, prefix: str) -> list[dict[str, Any]]:
        texts = (path.read_text("utf-8") for path in self.logs.glob(REQUEST_LOGS))
        complete = (line for text in texts for line in text.splitlines() if line.endswith("}"))
        return [line for line in map(json.loads, complete) if line["id"].startswith(prefix)]


def generator(name: str = SIM_MODEL, policy: str = "prefix") -> dict[str, Any]:
    """Return the configuration of a pool with a fixed number of replicas."""
    return {
        "name": name,
        "model": SIM_MODEL,
        "engine": "sim",
        "sim": {
            "prefill_s_per_token": 6e-4,
            "decode_s_per_token": 0.05,
            "batch_slowdown": 0.05,
            "num_kv_blocks": 2000,
        },
        "max_in_flight": 64,
        "routing": policy,
        "replicas": {"min": REPLICAS, "max": REPLICAS},
        "resources": {"cpus": 0.05},
    }


def slug(peer: str) -> str:
    """Return the name of a peer's pool."""
    return peer.replace(",", "").replace(" ", "-")


PEERS_BY_SLUG = {slug(name): make for name, make in PEERS.items()}


@contextmanager
def peer_policy(peer: str) -> Iterator[None]:
    """Make pools that are created in this context use a peer's policy; ``peer`` is its slug."""
    make = PEERS_BY_SLUG[peer]

    def make_policy(_name: str, index: PrefixIndex, seed: int) -> Policy:
        return make(index, lambda _replica, _request: 0.0, seed)  # peers do not know the caches

    with patch.object(replica_set, "make_policy", make_policy):
        yield


@contextmanager
def live_cluster(policy: str) -> Iterator[LiveCluster]:
    """Start a cluster and wait until all replicas are ready."""
    if policy in OUR_POLICIES:
        name, path = SIM_MODEL, ""
        main, extra = generator(policy=policy), []
    else:
        name, path = slug(policy), PEER_PATH
        main = {**generator(), "replicas": {"min": 0, "max": 1}}  # gets no requests
        extra = [ExtraApplication(path, PEER_APP, {"generators": [generator(name)]})]
    with tandem_with_pools({"generators": [main]}, name, ROUTER, extra) as running:
        at = running.endpoint
        live = LiveCluster(at.url + path, name, at.headers, log_directory(running.home.path))
        live.wait_ready()
        yield live
