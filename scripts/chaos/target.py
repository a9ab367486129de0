"""Cluster under test: its processes, its replicas, and the faults that can be injected."""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.endpoint import TargetError
from benchmarks.targets.running import REAL_MODEL
from benchmarks.targets.tandem import tandem_default
from chaos.accounting import Goal
from cluster.engines.lifeline import PARENT_VARIABLE
from cluster.launch import processes
from cluster.launch.serve_api import DeploymentStatus, ServeApi, ray_token
from cluster.launch.state import ClusterState, load

ROUTER, GENERATOR = "router", f"generator-{REAL_MODEL}"
STREAM, CLASSIFY, JOB = "stream", "classify", "job"
"""Kinds of requests: streams and classifications over HTTP, and streams of a Ray job."""
RECOVERY_S = 180.0
"""Time for a replica with the real engine to start on a busy machine."""
POLL_S = 0.1
KILL_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Victim:
    """Process to kill."""

    process: psutil.Process
    replica: str = ""
    """Id of the replica that dies with it; empty if none does."""

    def kill(self) -> float:
        """Kill the process and return the time at which it has ended."""
        self.process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(KILL_POLL_S)
        return time.monotonic()


class Cluster:
    """Running cluster of Tandem; only processes that carry its id are killed."""

    def __init__(self, home: Path, state: ClusterState, api_key: str | None = None) -> None:
        self.home = home
        self.state = state
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def deployments(self) -> list[DeploymentStatus]:
        """Return the deployments; an empty list unless all are healthy."""
        with ServeApi(self.state.dashboard_url, ray_token(os.environ)) as api:
            application = api.application(self.state.application)
        return list(application.deployments) if application and application.running else []

    def replicas(self) -> dict[str, str]:
        """Return the deployment of each running replica, by the replica's id."""
        return {
            replica.id: deployment.name
            for deployment in self.deployments()
            for replica in deployment.replicas
            if replica.state == "RUNNING"
        }

    def owned(self) -> list[psutil.Process]:
        return [
            member.process
            for member in processes.find(self.home)
            if member.cluster_id == self.state.cluster_id
        ]

    def process_titled(self, title: str) -> Victim | None:
        """Return the newest process with ``title`` in its command line."""
        found = []
        for process in self.owned():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid, process))
        return Victim(max(found)[2]) if found else None

    def process_of_replica(self, deployment: str, rng: random.Random) -> Victim | None:
        """Return the process of a random replica of a deployment."""
        owned = {process.pid: process for process in self.owned()}
        found = [
            Victim(owned[replica.pid], replica.id)
            for one in self.deployments()
            for replica in one.replicas
            if one.name == deployment and replica.state == "RUNNING" and replica.pid in owned
        ]
        return rng.choice(found) if found else None

    def engine(self, rng: random.Random) -> Victim | None:
        """Return the engine process of a random generator replica."""
        if (replica := self.process_of_replica(GENERATOR, rng)) is None:
            return None
        pid = str(replica.process.pid)
        for process in self.owned():
            with contextlib.suppress(psutil.Error):
                is_child = processes.environment_of(process.pid).get(PARENT_VARIABLE) == pid
                if is_child and "resource_tracker" not in " ".join(process.cmdline()):
                    return Victim(process, replica.replica)
        return None

    def wait_ready(self) -> None:
        """Wait until all deployments are healthy and the router is ready.

        Raises:
            TargetError: They are not within ``RECOVERY_S``.
        """
        deadline = time.monotonic() + RECOVERY_S
        url = f"{self.state.http_url}/ready"
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                ready = httpx.get(url, headers=self.headers, timeout=5, trust_env=False)
                if ready.is_success and self.deployments():
                    return
            time.sleep(POLL_S)
        raise TargetError(f"{self.state.http_url} was not ready within {RECOVERY_S:g} s.")


@dataclass(frozen=True, slots=True)
class Fault:
    """Kind of process to kill, and what clients may see of it."""

    find: Callable[[Cluster, random.Random], Victim | None]
    served: frozenset[str]
    """Kinds of requests whose connections end at, or pass through, the process."""
    goal: Goal


FAULTS: Mapping[str, Fault] = {
    "controller": Fault(
        lambda cluster, _: cluster.process_titled("ray::ServeController"),
        frozenset(),
        Goal(failed=0, restarted=0),
    ),
    "haproxy": Fault(
        lambda cluster, _: cluster.process_titled("haproxy -db"),
        frozenset({STREAM, CLASSIFY}),
        Goal(failed=0, restarted=0, outage_s=2.0),
    ),
    "router": Fault(
        lambda cluster, rng: cluster.process_of_replica(ROUTER, rng),
        frozenset({STREAM, CLASSIFY, JOB}),
        Goal(restarted=1),
    ),
    "engine": Fault(lambda cluster, rng: cluster.engine(rng), frozenset(), Goal(restarted=1)),
    "replica": Fault(
        lambda cluster, rng: cluster.process_of_replica(GENERATOR, rng),
        frozenset(),
        Goal(restarted=1),
    ),
}


@contextlib.contextmanager
def open_cluster(home: Path | None, api_key: str | None) -> Iterator[Cluster]:
    """Yield the running cluster of ``home``, or start the default configuration if it is None.

    Raises:
        TargetError: No cluster runs, or it did not start.
    """
    if home is not None:
        state = load(home)
        if state is None or not processes.find(home):
            raise TargetError(f"No cluster is running in {home}. Start one with `tandem up`.")
        yield Cluster(home, state, api_key)
        return
    with tandem_default() as ready:
        path = ready.running.home.path
        state = load(path)
        assert state is not None  # written by `tandem up`
        yield Cluster(path, state, api_key)
