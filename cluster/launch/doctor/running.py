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

from cluster.config.file import LoadedConfig
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
        yield ok("authentication", "RAY_AUTH_MODE is token, and there is one")
    else:
        text = "Ray asks for no token: every user of this machine can run jobs in the cluster"
        yield warn("authentication", text, "on shared machines set RAY_AUTH_MODE=token")
    if loaded.config.router.requires_keys:
        yield ok("authentication", "the router asks for API keys")
    elif _is_loopback(loaded.http_host):
        yield ok("authentication", "the router asks for no key, and listens on loopback alone")
    else:
        text = f"the router listens on {loaded.http_host} and asks for no key"
        yield fail("authentication", text, "make one: `tandem keys add TENANT`")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_answers(running: state.ClusterState) -> Iterator[Finding]:
    """The router, Prometheus, Ray's dashboard with its token, service discovery and clock."""
    token = ray_token(os.environ)
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
        yield _check_router(client, running.http_url)
        if running.prometheus_url:
            yield _check_prometheus(client, running.prometheus_url)
        url = f"{running.dashboard_url}{DISCOVERY}"
        try:
            answer = without = client.get(url)
            if token:
                answer = client.get(url, headers={"authorization": f"Bearer {token}"})
        except httpx.HTTPError as error:
            text = f"Ray's dashboard does not answer at {running.dashboard_url} ({error!r})"
            yield fail("service discovery", text, "see dashboard.log (`tandem logs`)")
            return
    yield from check_token(token, without, answer)
    if not _is_refused(answer):
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


def _check_prometheus(client: httpx.Client, url: str) -> Finding:
    advice = "see monitoring/prometheus.log below Tandem's home, and docs/runbooks/target-down.md"
    try:
        answer = client.get(f"{url}/api/v1/targets", params={"state": "active"})
        targets = answer.json()["data"]["activeTargets"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return fail("prometheus", f"does not answer at {url} ({error!r})", advice)
    down = sorted(target["scrapeUrl"] for target in targets if target["health"] == "down")
    if down or not targets:
        text = f"gets no answer from {', '.join(down)}" if down else "knows nobody to scrape yet"
        return warn("prometheus", text, advice)
    return ok("prometheus", f"scrapes {len(targets)} targets at {url}")


def check_token(
    token: str | None, without: httpx.Response, answer: httpx.Response
) -> Iterator[Finding]:
    """Whether this shell's Ray token is the one with which the cluster was started.

    Args:
        token: This shell's; None: ``RAY_AUTH_MODE`` is not token here.
        without: What Ray's dashboard answered to a request without a token.
        answer: And to one with this shell's, where there is one.
    """
    if _is_refused(answer):
        text = f"the cluster that runs does not take this shell's Ray token ({answer.status_code})"
        if token is None:
            text = "the cluster that runs asks for Ray's token, and this shell gives none"
        advice = "set RAY_AUTH_MODE=token and the RAY_AUTH_TOKEN with which it was started"
        yield fail("authentication", text, advice)
    elif _is_refused(without):
        yield ok("authentication", "the cluster that runs takes this shell's Ray token")
    elif token is not None:
        text = "the cluster that runs asks for no token: it was started without RAY_AUTH_MODE=token"
        yield fail("authentication", text, "start it again with RAY_AUTH_MODE=token")


def _is_refused(answer: httpx.Response) -> bool:
    return answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


def check_discovery(answer: httpx.Response) -> Finding:
    """Whether Ray tells Prometheus whom to scrape."""
    try:
        groups: Any = answer.json() if answer.is_success else None
        targets = [target for group in groups for target in group["targets"]]
    except (ValueError, TypeError, KeyError):
        text = f"{DISCOVERY} answered {answer.status_code} and no targets"
        return fail("service discovery", text, "see dashboard.log (`tandem logs`)")
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
