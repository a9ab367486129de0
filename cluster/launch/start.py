"""Start of a healthy local cluster from a configuration; a failed start is rolled back."""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from cluster.config.file import LoadedConfig, key_file_path
from cluster.errors import StartError
from cluster.launch import auth, charts, environment, ports, processes, prometheus, state
from cluster.launch.ports import LOOPBACK
from cluster.launch.redis import HEAD_TIMEOUT_S, Redis, check_redis, parse_redis
from cluster.launch.serve_api import ApplicationStatus, parse_application
from cluster.launch.starter import HeadInfo, StarterInput
from cluster.launch.starter_process import head_params, run_starter
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
    loaded: LoadedConfig,
    home: Path,
    observe: StartObserver,
    *,
    monitoring: bool = False,
    address: str | None = None,
    redis: str | None = None,
) -> StartResult:
    """Start a cluster and return once all deployments are healthy.

    After any exception, everything already started is stopped again. ``monitoring`` starts
    Prometheus and Grafana, or its stand-in, as well. Other nodes can join if ``address`` is this
    node's address. ``redis`` is the URL of a Redis that keeps the GCS' state; if it has the state
    of a cluster, this is its new head. The state stays there after a failed start, also a first
    one; the next start resumes it, and ``stop`` with ``end_cluster`` deletes it.

    Raises:
        StartError: a cluster runs already, a port is in use, Prometheus is not installed, or a
            part did not become healthy in time.
    """
    store = parse_redis(redis) if redis else None
    phases = Phases(observe)
    with start_lock(home):
        phases.enter("checks")
        clear_home(home)
        required = ports.required_ports(
            loaded,
            haproxy=environment.uses_haproxy(),
            monitoring=monitoring,
            address=address or LOOPBACK,
        )
        if monitoring:
            prometheus.executable()
        check_ports(required)
        if store:
            check_redis(store)
        if address and not auth.store_token(os.environ, home):
            auth.create_token(home)
        started = _new_state(loaded, monitoring=monitoring, address=address, redis=redis)
        try:
            _start(loaded, home, started, phases, store)
        except BaseException:
            stop(home, drain_s=0)
            raise
    phases.end()
    return StartResult(started, phases.seconds)


def clear_home(home: Path) -> None:
    """End the leftovers of a crash.

    Raises:
        StartError: the cluster of this home runs, or this node is part of one.
    """
    running = state.load(home)
    if owned := processes.find(home):
        if running and state.is_alive(owned, running):
            minutes = f"{running.uptime_s / 60:.0f} min"
            if not running.is_head:
                raise StartError(
                    f"this node joined the cluster of {running.ray_address} {minutes} ago. See "
                    "`tandem status`, or leave it with `tandem down`."
                )
            raise StartError(
                f"a cluster has been running for {minutes} at {running.http_url}. See `tandem "
                "status`, or stop it with `tandem down`."
            )
        stop(home, drain_s=0)


def check_ports(required: Iterable[ports.Port]) -> None:
    """Raise StartError if a port is in use, or its address is not one of this machine."""
    if busy := ports.find_busy(required):
        raise StartError(" ".join(dict.fromkeys(map(str, busy))))


def _new_state(
    loaded: LoadedConfig, *, monitoring: bool, address: str | None, redis: str | None
) -> state.ClusterState:
    cluster = loaded.config.cluster
    has_charts = monitoring and ports.USERS_GRAFANA not in os.environ
    local = {"0.0.0.0": address or LOOPBACK, "::": address or "::1"}
    host = ports.url_host(local.get(loaded.http_host, loaded.http_host))
    return state.ClusterState(
        cluster_id=str(uuid.uuid4()),
        application=loaded.application,
        http_url=f"{_scheme(loaded)}://{host}:{loaded.http_port}",
        dashboard_url=f"http://{address or LOOPBACK}:{cluster.dashboard_port}",
        ray_address=f"{address or RAY_HOST}:{cluster.ray_port}",
        address=address,
        keys_in_cluster=loaded.config.router.keys_in_cluster,
        config_path=str(loaded.path),
        started_at=time.time(),
        prometheus_url=f"http://{LOOPBACK}:{cluster.prometheus_port}" if monitoring else None,
        grafana_url=f"http://{LOOPBACK}:{cluster.grafana_port}" if has_charts else None,
        grafana_is_stand_in=has_charts and charts.grafana_executable() is None,
        overrides=list(loaded.overrides),
        redis=redis,
    )


def _start(
    loaded: LoadedConfig,
    home: Path,
    new: state.ClusterState,
    phases: Phases,
    redis: Redis | None,
) -> None:
    haproxy = environment.uses_haproxy()
    state.save(home, new)
    if haproxy:
        environment.write_haproxy_wrapper(new.cluster_id)
    variables = environment.cluster_environment(
        os.environ, home, new.cluster_id, haproxy=haproxy, several_nodes=new.address is not None
    )
    router = loaded.config.router
    if redis:
        variables = redis.add_variables(variables)
    if new.prometheus_url:
        variables |= prometheus.ray_variables(home, new.prometheus_url)
    if new.grafana_url:
        variables |= charts.ray_variables(new.grafana_url)
    request = StarterInput(
        ray=head_params(loaded.config.cluster, new.address, redis),
        ray_address=new.ray_address,
        serve=loaded.serve_config,
        application=new.application,
        head=_head_info(loaded, new, haproxy=haproxy) if new.address else None,
        key_file=str(key_file_path(router)) if router.keys_in_cluster else None,
    )
    deadline = time.monotonic() + loaded.config.cluster.ready_timeout_s
    log = state.run_dir(home) / "start.log"
    phases.enter("Ray")
    _follow(run_starter(request, variables, log, deadline), phases)
    phases.enter("HTTP")
    wait_for_http(f"{new.http_url}/-/healthz", deadline)
    if new.prometheus_url:
        phases.enter("Prometheus")
        process = prometheus.start(home, new, variables, requires_keys=router.requires_keys)
        wait_for_http(f"{new.prometheus_url}/-/ready", deadline, process.check)
        process.detach()
    if new.grafana_url:
        phases.enter("charts")
        process = charts.start(home, new, variables)
        wait_for_http(f"{new.grafana_url}/api/health", deadline, process.check)
        process.detach()


def _scheme(loaded: LoadedConfig) -> str:
    return "https" if loaded.config.router.tls else "http"


def _head_info(loaded: LoadedConfig, new: state.ClusterState, *, haproxy: bool) -> HeadInfo:
    return HeadInfo(
        tandem=version("tandem"),
        application=new.application,
        http_port=loaded.http_port,
        http_scheme=_scheme(loaded),
        haproxy=haproxy,
        dashboard_url=new.dashboard_url,
        object_store_memory_bytes=int(loaded.config.cluster.object_store_memory_bytes),
        head_timeout_s=HEAD_TIMEOUT_S if new.redis else None,
        serve=loaded.serve_config,
    )


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


def wait_for_http(url: str, deadline: float, check: Callable[[], None] = lambda: None) -> None:
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
def start_lock(home: Path) -> Iterator[None]:
    lock = state.run_dir(home) / "start.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError("another `tandem up` or `tandem join` is starting already") from None
        yield
