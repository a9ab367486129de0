"""``start``: from a configuration to a healthy local cluster, and back again if that fails."""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cluster.config.file import LoadedConfig
from cluster.errors import StartError
from cluster.launch import environment, ports, prometheus, state
from cluster.launch.head import LOOPBACK, Starter, ray_params
from cluster.launch.processes import find, has_head
from cluster.launch.serve_api import ApplicationStatus, parse_application
from cluster.launch.stop import stop

POLL_S = 0.1

Watcher = Callable[[str, ApplicationStatus | None], None]
"""Called with the current phase and, once there is one, the application's status."""


@dataclass(slots=True)
class Phases:
    """How long each part of a start took, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    @property
    def total_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Started:
    """A healthy cluster."""

    state: state.ClusterState
    phases: Phases


def start(loaded: LoadedConfig, home: Path, watch: Watcher, *, monitoring: bool = False) -> Started:
    """Start a cluster for ``loaded`` and return when every deployment is healthy.

    Args:
        loaded: What is to run.
        home: Where its state lies.
        watch: Is told how far it is.
        monitoring: Start Prometheus beside it.

    Raises:
        StartError: a cluster runs already, a port is taken, Prometheus is not installed, or
            something did not become healthy. Nothing that was started is left then, nor after
            any other exception.
    """
    phases = Phases()
    with _only_one_start(home):
        with phases.phase("checks"):
            watch("checks", None)
            _check(loaded, home, monitoring=monitoring)
        started = _new_state(loaded, monitoring=monitoring)
        try:
            _start(loaded, home, started, phases, watch)
        except BaseException:
            stop(home, drain_s=0)
            raise
    return Started(started, phases)


def _check(loaded: LoadedConfig, home: Path, *, monitoring: bool) -> None:
    running = state.load(home)
    if owned := find(home):
        if running and has_head(owned):
            raise StartError(
                f"a cluster runs already, since {running.uptime_s / 60:.0f} min, at "
                f"{running.http_url}; `tandem status` shows it, `tandem down` ends it"
            )
        stop(home, drain_s=0)  # what a crash left
    needed = ports.needed(
        loaded.config.cluster,
        loaded.http_host,
        loaded.http_port,
        haproxy=environment.uses_haproxy(),
        monitoring=monitoring,
    )
    if monitoring:
        prometheus.executable()
    if taken := ports.busy(needed):
        raise StartError("; ".join(map(str, taken)))


def _new_state(loaded: LoadedConfig, *, monitoring: bool) -> state.ClusterState:
    cluster = loaded.config.cluster
    host = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(loaded.http_host, loaded.http_host)
    return state.ClusterState(
        cluster_id=str(uuid.uuid4()),
        application=loaded.application,
        http_url=f"http://{host}:{loaded.http_port}",
        dashboard_url=f"http://{LOOPBACK}:{cluster.dashboard_port}",
        ray_address=f"{RAY_HOST}:{cluster.ray_port}",
        config_path=str(loaded.path),
        started_at=time.time(),
        prometheus_url=f"http://{LOOPBACK}:{cluster.prometheus_port}" if monitoring else None,
        overrides=list(loaded.overrides),
    )


RAY_HOST = "LOCALHOST"
"""Loopback as other Ray jobs must write it: Ray replaces "127.0.0.1" and "localhost" by the
machine's outer address, where nothing of this cluster listens, and leaves other spellings alone."""


def _start(
    loaded: LoadedConfig, home: Path, new: state.ClusterState, phases: Phases, watch: Watcher
) -> None:
    haproxy = environment.uses_haproxy()
    state.save(home, new)
    if haproxy:
        environment.write_haproxy_wrapper(new.cluster_id)
    variables = environment.cluster_environment(os.environ, home, new.cluster_id, haproxy=haproxy)
    if new.prometheus_url:
        variables |= prometheus.ray_variables(home, new.prometheus_url)
    starter = Starter(
        order={
            "ray": ray_params(loaded.config.cluster),
            "ray_address": new.ray_address,
            "serve": loaded.serve_config,
            "application": new.application,
        },
        environment=variables,
        log=state.run_dir(home) / "start.log",
    )
    deadline = time.monotonic() + loaded.config.cluster.ready_timeout_s
    _follow(starter, deadline, phases, watch)
    with phases.phase("HTTP"):
        watch("HTTP", None)
        _wait_for_http(f"{new.http_url}/-/healthz", deadline)
    if new.prometheus_url:
        with phases.phase("Prometheus"):
            watch("Prometheus", None)
            running = prometheus.start(loaded, home, new, variables)
            _wait_for_http(f"{new.prometheus_url}/-/ready", deadline, running.check)
            running.leave()


def _follow(starter: Starter, deadline: float, phases: Phases, watch: Watcher) -> None:
    """Read the starter's reports until everything runs."""
    seen: ApplicationStatus | None = None
    phase, began = "Ray", time.monotonic()
    try:
        for report in starter.reports(deadline):
            if (entered := report.get("phase")) and entered != phase:
                now = time.monotonic()
                phases.seconds[phase] = now - began
                phase, began = entered, now
            if found := report.get("application"):
                seen = parse_application(found)
                if failure := seen.failure:
                    raise StartError(f"the application could not be started: {failure}")
            if phase != "done":
                watch(phase, seen)
    except TimeoutError:
        missing = _missing(seen) if phase == "application" else f"{phase} was not ready"
        raise StartError(f"nothing healthy within cluster.ready_timeout_s: {missing}") from None


def _missing(status: ApplicationStatus | None) -> str:
    if status is None or not status.deployments:
        return "its deployments were not made"
    return ", ".join(
        f"{d.name} has {d.running} of {d.target} replicas ({d.status})"
        for d in status.deployments
        if not d.healthy
    )


def _wait_for_http(url: str, deadline: float, check: Callable[[], None] = lambda: None) -> None:
    """Wait until ``url`` answers; ``check`` raises where it never will."""
    while not _is_ok(url):
        check()
        if time.monotonic() > deadline:
            raise StartError(f"{url} did not answer within cluster.ready_timeout_s")
        time.sleep(POLL_S)


def _is_ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def _only_one_start(home: Path) -> Iterator[None]:
    """Refuse a second start with the same home while one is under way."""
    lock = state.run_dir(home) / "start.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("another `tandem up` is starting a cluster right now") from None
        yield
