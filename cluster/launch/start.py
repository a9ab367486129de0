"""Start of a healthy local cluster from a configuration; a failed start is rolled back."""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.config.file import LoadedConfig
from cluster.errors import StartError
from cluster.launch import environment, ports, processes, prometheus, state
from cluster.launch.serve_api import ApplicationStatus, parse_application
from cluster.launch.starter import StarterInput
from cluster.launch.starter_process import LOOPBACK, ray_params, run_starter
from cluster.launch.stop import stop

POLL_S = 0.1

StartObserver = Callable[[str, ApplicationStatus | None], None]
"""Callback with the current phase and the application's status, once it has one."""

RAY_HOST = "LOCALHOST"
"""Host of ``RAY_ADDRESS``. Ray replaces "127.0.0.1" and "localhost", but no other spelling, by the
machine's external address, on which this cluster does not listen."""


class Phases:
    """Phases of a start: reported to ``observe``, and timed."""

    def __init__(self, observe: StartObserver) -> None:
        self._observe = observe
        self.current = ""
        self._began = time.monotonic()
        self.seconds: dict[str, float] = {}
        """Duration of each phase, in seconds."""

    def enter(self, name: str, application: ApplicationStatus | None = None) -> None:
        """Enter phase ``name``, or report progress in it."""
        if name != self.current:
            self.end()
            self.current, self._began = name, time.monotonic()
        self._observe(name, application)

    def end(self) -> None:
        if self.current:
            self.seconds[self.current] = time.monotonic() - self._began


@dataclass(frozen=True, slots=True)
class StartResult:
    """State of a started cluster, and the durations of its start."""

    state: state.ClusterState
    phases: Mapping[str, float]
    """Duration of each phase, in seconds."""


def start(
    loaded: LoadedConfig, home: Path, observe: StartObserver, *, monitoring: bool = False
) -> StartResult:
    """Start a cluster and return once all deployments are healthy.

    After any exception, everything already started is stopped again. ``monitoring`` starts
    Prometheus as well.

    Raises:
        StartError: a cluster runs already, a port is in use, Prometheus is not installed, or a
            part did not become healthy in time.
    """
    phases = Phases(observe)
    with _start_lock(home):
        phases.enter("checks")
        _check(loaded, home, monitoring=monitoring)
        started = _new_state(loaded, monitoring=monitoring)
        try:
            _start(loaded, home, started, phases)
        except BaseException:
            stop(home, drain_s=0)
            raise
    phases.end()
    return StartResult(started, phases.seconds)


def _check(loaded: LoadedConfig, home: Path, *, monitoring: bool) -> None:
    running = state.load(home)
    if owned := processes.find(home):
        if running and processes.has_head(owned):
            raise StartError(
                f"a cluster has been running for {running.uptime_s / 60:.0f} min at "
                f"{running.http_url}. See `tandem status`, or stop it with `tandem down`."
            )
        stop(home, drain_s=0)  # leftovers of a crash
    haproxy = environment.uses_haproxy()
    required = ports.required_ports(loaded, haproxy=haproxy, monitoring=monitoring)
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
        http_url=f"{'https' if loaded.config.router.tls else 'http'}://{host}:{loaded.http_port}",
        dashboard_url=f"http://{LOOPBACK}:{cluster.dashboard_port}",
        ray_address=f"{RAY_HOST}:{cluster.ray_port}",
        config_path=str(loaded.path),
        started_at=time.time(),
        prometheus_url=f"http://{LOOPBACK}:{cluster.prometheus_port}" if monitoring else None,
        overrides=list(loaded.overrides),
    )


def _start(loaded: LoadedConfig, home: Path, new: state.ClusterState, phases: Phases) -> None:
    haproxy = environment.uses_haproxy()
    state.save(home, new)
    if haproxy:
        environment.write_haproxy_wrapper(new.cluster_id)
    variables = environment.cluster_environment(os.environ, home, new.cluster_id, haproxy=haproxy)
    if new.prometheus_url:
        variables |= prometheus.ray_variables(home, new.prometheus_url)
    request = StarterInput(
        ray=ray_params(loaded.config.cluster),
        ray_address=new.ray_address,
        serve=loaded.serve_config,
        application=new.application,
    )
    deadline = time.monotonic() + loaded.config.cluster.ready_timeout_s
    log = state.run_dir(home) / "start.log"
    phases.enter("Ray")
    _follow(run_starter(request, variables, log, deadline), phases)
    phases.enter("HTTP")
    _wait_for_http(f"{new.http_url}/-/healthz", deadline)
    if new.prometheus_url:
        phases.enter("Prometheus")
        requires_keys = loaded.config.router.requires_keys
        process = prometheus.start(home, new, variables, requires_keys=requires_keys)
        _wait_for_http(f"{new.prometheus_url}/-/ready", deadline, process.check)
        process.detach()


def _follow(reports: Iterator[Mapping[str, Any]], phases: Phases) -> None:
    """Follow the starter's reports until the application runs."""
    seen: ApplicationStatus | None = None
    poll_error: str | None = None
    try:
        for report in reports:
            poll_error = report.get("poll_error")
            if found := report.get("application"):
                seen = parse_application(found)
                if failure := seen.failure:
                    raise StartError(f"the application failed to start: {failure}")
            phase = report.get("phase", phases.current)
            if phase != "done":
                phases.enter(phase, seen)
    except TimeoutError:
        missing = f"{phases.current} was not ready"
        if phases.current == "application":
            missing = f"status unknown: {poll_error}" if poll_error else _unhealthy(seen)
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
        # This asks for readiness only; the certificate may be for another name.
        response = httpx.get(url, timeout=5.0, trust_env=False, verify=False)
        return response.status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def _start_lock(home: Path) -> Iterator[None]:
    lock = state.run_dir(home) / "start.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("another `tandem up` is already starting a cluster") from None
        yield
