"""The cluster itself: its ports, its processes and those of earlier ones, and what it answers."""

import ipaddress
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config_file import LoadedConfig
from cluster.launch import environment, ports, processes, state
from cluster.launch.auth import ray_token
from cluster.launch.doctor.finding import Finding, fail, ok, warn

DISCOVERY = "/api/prometheus/sd"
MAX_SKEW_S = 2.0
"""The Date header counts whole seconds."""
MAX_STEP_S = 0.1
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Clocks:
    """Both clocks of this machine at one moment, in seconds."""

    wall: float
    monotonic: float

    @classmethod
    def read(cls) -> "Clocks":
        """The clocks now."""
        return cls(time.time(), time.monotonic())


def check_ports(loaded: LoadedConfig, owned: list[processes.Owned]) -> Iterator[Finding]:
    """Whether each port is free, or this cluster's own."""
    needed = ports.needed(
        loaded.config.cluster,
        loaded.http_host,
        loaded.http_port,
        haproxy=environment.uses_haproxy(),
        monitoring=False,
    )
    ours = {process.process.pid for process in owned}
    taken = {busy.port: busy for busy in ports.busy(needed)}
    for port in needed:
        text = f"{port.number} ({port.use})"
        busy = taken.get(port)
        if busy is None:
            yield ok("ports", f"{text} is free")
        elif busy.process is not None and busy.process.pid in ours:
            yield ok("ports", f"{text} is this cluster's")
        else:
            yield fail("ports", f"{text} is taken", str(busy))


def check_processes(home: Path, owned: list[processes.Owned]) -> Iterator[Finding]:
    """What earlier clusters left: processes without a head."""
    if not owned:
        yield ok("processes", "no cluster runs")
    elif processes.has_head(owned):
        yield ok("processes", f"a cluster runs in {len(owned)} processes")
    else:
        names = processes.describe([process.process for process in owned[:5]])
        text = f"{len(owned)} processes are left of a dead cluster: {names}"
        yield fail("processes", text, "`tandem down` ends them")
    for other, count in _headless_elsewhere(home).items():
        text = f"{count} processes are left of a dead cluster whose home is {other}"
        yield warn("processes", text, f"`TANDEM_HOME={other} tandem down` ends them")


def _headless_elsewhere(home: Path) -> dict[str, int]:
    homes: dict[str, list[str]] = {}
    for process in psutil.process_iter(["name"]):
        variables = processes.environment_of(process.pid)
        if (other := variables.get(processes.HOME)) and other != str(home):
            homes.setdefault(other, []).append(process.info["name"] or "")
    return {other: len(names) for other, names in homes.items() if "gcs_server" not in names}


def check_auth(variables: Mapping[str, str], loaded: LoadedConfig) -> Iterator[Finding]:
    """Ray's token mode, and the router's keys."""
    mode = variables.get("RAY_AUTH_MODE", "").lower() or "disabled"
    if mode == "token" and ray_token(variables) is None:
        advice = "set RAY_AUTH_TOKEN, or write one to ~/.ray/auth_token (`ray get-auth-token`)"
        yield fail("authentication", "RAY_AUTH_MODE is token, and there is no token", advice)
    elif mode == "token":
        yield ok("authentication", "Ray asks for its token")
    else:
        text = "Ray asks for no token: every user of this machine can run jobs in the cluster"
        yield warn("authentication", text, "on shared machines set RAY_AUTH_MODE=token")
    if loaded.config.router.api_keys_sha256:
        yield ok("authentication", "the router asks for API keys")
    elif _is_loopback(loaded.http_host):
        yield ok("authentication", "the router asks for no key, and listens on loopback alone")
    else:
        text = f"the router listens on {loaded.http_host} and asks for no key"
        yield fail("authentication", text, "list keys in router.api_keys_sha256")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_answers(running: state.ClusterState) -> Iterator[Finding]:
    """The router, Ray's dashboard, its service discovery for Prometheus, and its clock."""
    token = ray_token(os.environ)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
        yield _check_router(client, running.http_url)
        try:
            answer = client.get(f"{running.dashboard_url}{DISCOVERY}", headers=headers)
        except httpx.HTTPError as error:
            text = f"Ray's dashboard does not answer at {running.dashboard_url} ({error!r})"
            yield fail("service discovery", text, "see dashboard.log (`tandem logs`)")
            return
    yield check_discovery(answer)
    if date := answer.headers.get("date"):
        yield check_skew(parsedate_to_datetime(date).timestamp() - time.time())


def _check_router(client: httpx.Client, url: str) -> Finding:
    advice = "see `tandem status` and `tandem logs`"
    try:
        answer = client.get(f"{url}/ready")
    except httpx.HTTPError as error:
        return fail("router", f"nothing answers at {url} ({error!r})", advice)
    if answer.status_code == httpx.codes.OK:
        return ok("router", f"is ready at {url}")
    return warn("router", f"a pool is not ready ({url}/ready says {answer.status_code})", advice)


def check_discovery(answer: httpx.Response) -> Finding:
    """Whether Ray tells Prometheus whom to scrape."""
    try:
        groups: Any = answer.json() if answer.is_success else None
        targets = [target for group in groups for target in group["targets"]]
    except (ValueError, TypeError, KeyError):
        text = f"{DISCOVERY} answered {answer.status_code} and no targets"
        return fail("service discovery", text, "with RAY_AUTH_MODE=token, set Ray's token here too")
    if not targets:
        return warn("service discovery", "names nobody to scrape", "wait; Ray refreshes it in 5 s")
    return ok("service discovery", f"{len(targets)} targets for Prometheus")


def check_skew(skew_s: float) -> Finding:
    """Whether the clock of Ray's head node is this one's."""
    text = f"the head node's is {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > MAX_SKEW_S:
        return warn("clock", text, "let NTP set the clocks of all nodes")
    return ok("clock", f"{text}, as exactly as can be told")


def check_steps(before: Clocks, after: Clocks) -> Finding:
    """Whether somebody set the wall clock meanwhile."""
    step_s = (after.wall - before.wall) - (after.monotonic - before.monotonic)
    if abs(step_s) > MAX_STEP_S:
        text = f"the wall clock was set by {step_s:+.2f} s while this ran"
        return warn("clock", text, "let NTP slew it; times in logs and charts are off now")
    return ok("clock", "runs evenly")
