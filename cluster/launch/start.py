"""Start of a healthy local cluster from a configuration; a failed start is rolled back."""

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
from cluster.launch import environment, ports, processes, prometheus, state
from cluster.launch.serve_api import ApplicationStatus, parse_application
from cluster.launch.starter_process import LOOPBACK, StarterProcess, ray_params
from cluster.launch.stop import stop

POLL_S = 0.1

StartObserver = Callable[[str, ApplicationStatus | None], None]
"""Callback with the current phase and the application's status, once it has one."""

RAY_HOST = "LOCALHOST"
"""Host of ``RAY_ADDRESS``. Ray replaces "127.0.0.1" and "localhost", but no other spelling, by the
machine's external address, on which this cluster does not listen."""


@dataclass(slots=True)
class PhaseTimer:
    """Durations of the phases of a start."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Duration by phase, in seconds."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def total_s(self) -> float:
        """Time since the start began, in seconds."""
        return time.monotonic() - self._began

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the duration of the ``with`` block."""
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


@dataclass(frozen=True, slots=True)
class StartResult:
    """State of a started cluster, and the durations of its start."""

    state: state.ClusterState
    phases: PhaseTimer


def start(
    loaded: LoadedConfig, home: Path, observe: StartObserver, *, monitoring: bool = False
) -> StartResult:
    """Start a cluster and return once all deployments are healthy.

    After any exception, everything already started is stopped again.

    Args:
        loaded: Configuration of the cluster.
        home: Tandem's home directory.
        observe: Called on progress.
        monitoring: True to start Prometheus as well.

    Raises:
        StartError: a cluster runs already, a port is in use, Prometheus is not installed, or a
            part did not become healthy in time.
    """
    phases = PhaseTimer()
    with _start_lock(home):
        with phases.phase("checks"):
            observe("checks", None)
            _check(loaded, home, monitoring=monitoring)
        started = _new_state(loaded, monitoring=monitoring)
        try:
            _start(loaded, home, started, phases, observe)
        except BaseException:
            stop(home, drain_s=0)
            raise
    return StartResult(started, phases)


def _check(loaded: LoadedConfig, home: Path, *, monitoring: bool) -> None:
    running = state.load(home)
    if owned := processes.find(home):
        if running and processes.has_head(owned):
            raise StartError(
                f"a cluster has been running for {running.uptime_s / 60:.0f} min at "
                f"{running.http_url}. See `tandem status`, or stop it with `tandem down`."
            )
        stop(home, drain_s=0)  # leftovers of a crash
    required = ports.required_ports(
        loaded.config.cluster,
        loaded.http_host,
        loaded.http_port,
        haproxy=environment.uses_haproxy(),
        monitoring=monitoring,
    )
    if monitoring:
        prometheus.executable()
    if busy := ports.find_busy(required):
        raise StartError(" ".join(map(str, busy)))


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


def _start(
    loaded: LoadedConfig,
    home: Path,
    new: state.ClusterState,
    phases: PhaseTimer,
    observe: StartObserver,
) -> None:
    haproxy = environment.uses_haproxy()
    state.save(home, new)
    if haproxy:
        environment.write_haproxy_wrapper(new.cluster_id)
    variables = environment.cluster_environment(os.environ, home, new.cluster_id, haproxy=haproxy)
    if new.prometheus_url:
        variables |= prometheus.ray_variables(home, new.prometheus_url)
    starter = StarterProcess(
        request={
            "ray": ray_params(loaded.config.cluster),
            "ray_address": new.ray_address,
            "serve": loaded.serve_config,
            "application": new.application,
        },
        environment=variables,
        log=state.run_dir(home) / "start.log",
    )
    deadline = time.monotonic() + loaded.config.cluster.ready_timeout_s
    _follow(starter, deadline, phases, observe)
    with phases.phase("HTTP"):
        observe("HTTP", None)
        _wait_for_http(f"{new.http_url}/-/healthz", deadline)
    if new.prometheus_url:
        with phases.phase("Prometheus"):
            observe("Prometheus", None)
            process = prometheus.start(loaded, home, new, variables)
            _wait_for_http(f"{new.prometheus_url}/-/ready", deadline, process.check)
            process.detach()


def _follow(
    starter: StarterProcess, deadline: float, phases: PhaseTimer, observe: StartObserver
) -> None:
    """Follow the starter's reports until the application runs."""
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
                    raise StartError(f"the application failed to start: {failure}")
            if phase != "done":
                observe(phase, seen)
    except TimeoutError:
        missing = _unhealthy(seen) if phase == "application" else f"{phase} was not ready"
        raise StartError(
            f"the cluster was not healthy within cluster.ready_timeout_s: {missing}"
        ) from None


def _unhealthy(status: ApplicationStatus | None) -> str:
    if status is None or not status.deployments:
        return "no deployments were created"
    return ", ".join(
        f"{d.name} has {d.running} of {d.target} replicas ({d.status})"
        for d in status.deployments
        if not d.healthy
    )


def _wait_for_http(url: str, deadline: float, check: Callable[[], None] = lambda: None) -> None:
    """Wait until ``url`` responds; ``check`` raises if it never will."""
    while not _is_ok(url):
        check()
        if time.monotonic() > deadline:
            raise StartError(f"{url} did not respond within cluster.ready_timeout_s")
        time.sleep(POLL_S)


def _is_ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def _start_lock(home: Path) -> Iterator[None]:
    """Hold the lock that prevents concurrent starts with the same home."""
    lock = state.run_dir(home) / "start.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("another `tandem up` is already starting a cluster") from None
        yield
