"""A cluster with one routing policy, ours or a peer's, for ``bench routing --live``."""

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
from benchmarks.targets.running import MODEL
from benchmarks.targets.tandem import Beside, tandem_of
from cluster.config import RoutingPolicy
from cluster.gateway.pools import pool
from cluster.launch.log_files import REQUEST_LOGS, log_directory
from cluster.routing import Policy, PrefixIndex

REPLICAS = 8
OURS: tuple[str, ...] = get_args(RoutingPolicy)
ROUTER = {"log_requests_per_s": 1000, "queue_timeout_s": 300, "resources": {"cpus": 0.1}}
READY_S = 120.0
LOG_S = 10.0
"""Until the last request is in the router's log."""
POLL_S = 0.2
PEER_PATH, PEER_APP = "/peer", "benchmarks.routing.peer_app:build"


@dataclass(frozen=True, slots=True)
class Live:
    """A cluster that answers."""

    url: str
    model: str
    headers: Mapping[str, str]
    logs: Path

    def wait_ready(self) -> None:
        """Return once the router has a link to every replica.

        Raises:
            TargetError: that took too long.
        """
        deadline_s = time.monotonic() + READY_S
        while True:
            found = httpx.get(f"{self.url}/ready").json()["pools"][self.model]
            if found["ready"] == REPLICAS:
                return
            if time.monotonic() > deadline_s:
                raise TargetError(f"{self.url}/ready after {READY_S:g} s: {found}")
            time.sleep(POLL_S)

    def logged(self, trace: str, count: int) -> list[dict[str, Any]]:
        """What the router's log says of each of so many requests of a trace's replay.

        Raises:
            TargetError: there are not as many.
        """
        deadline_s = time.monotonic() + LOG_S
        while len(lines := self._lines(f"{trace}-")) < count and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if len(lines) != count:
            raise TargetError(f"{self.logs} has {len(lines)} requests of {trace}, not {count}")
        return lines

    def _lines(self, prefix: str) -> list[dict[str, Any]]:
        texts = (path.read_text("utf-8") for path in self.logs.glob(REQUEST_LOGS))
        whole = (line for text in texts for line in text.splitlines() if line.endswith("}"))
        return [line for line in map(json.loads, whole) if line["id"].startswith(prefix)]


def generator(name: str = MODEL, policy: str = "prefix") -> dict[str, Any]:
    """A pool whose replicas stay as many as they are."""
    return {
        "name": name,
        "model": MODEL,
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
    """A peer's name as the name of a pool."""
    return peer.replace(",", "").replace(" ", "-")


BY_SLUG = {slug(name): make for name, make in PEERS.items()}


@contextmanager
def choosing_as(peer: str) -> Iterator[None]:
    """Pools that are made here and now choose as the peer with that slug."""
    make = BY_SLUG[peer]

    def make_policy(_name: str, index: PrefixIndex, seed: int) -> Policy:
        return make(index, lambda _replica, _request: 0.0, seed)  # nobody knows the caches

    with patch.object(pool, "make_policy", make_policy):
        yield


@contextmanager
def cluster(policy: str) -> Iterator[Live]:
    """A fresh one, all its replicas ready."""
    if policy in OURS:
        name, path = MODEL, ""
        usual, beside = generator(policy=policy), []
    else:
        name, path = slug(policy), PEER_PATH
        usual = {**generator(), "replicas": {"min": 0, "max": 1}}  # which nobody asks
        beside = [Beside(path, PEER_APP, {"generators": [generator(name)]})]
    with tandem_of({"generators": [usual]}, name, ROUTER, beside) as running:
        at = running.endpoint
        live = Live(at.url + path, name, at.headers, log_directory(running.home.path))
        live.wait_ready()
        yield live
