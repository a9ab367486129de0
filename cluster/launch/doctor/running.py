"""Checks of the cluster: ports, processes (also of earlier clusters), authentication, endpoints."""

import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.config.file import LoadedConfig, is_loopback
from cluster.launch import environment, ports, processes, state
from cluster.launch.auth import ray_token
from cluster.launch.doctor.finding import Finding, fail, ok, warn

DISCOVERY_PATH = "/api/prometheus/sd"
MAX_SKEW_S = 2.0  # the Date header has a resolution of 1 s
MAX_STEP_S = 0.1
TIMEOUT_S = 10.0


def check_ports(
    loaded: LoadedConfig,
    owned: list[processes.ClusterProcess],
    known: state.ClusterState | None = None,
) -> Iterator[Finding]:
    """Check the ports of this node; ``known`` is the running cluster."""
    haproxy = environment.uses_haproxy()
    if known is not None and not known.is_head:
        required = ports.haproxy_ports() if haproxy else []
    else:
        address = (known.address if known else None) or ports.LOOPBACK
        required = ports.required_ports(loaded, haproxy=haproxy, monitoring=False, address=address)
    ours = {process.process.pid for process in owned}
    if known is not None and not owned:  # started by others
        ours = set(_ray_processes())
    taken = {busy.port: busy for busy in ports.find_busy(required)}
    for port in required:
        text = f"{port.number} ({port.use})"
        busy = taken.get(port)
        if busy is None:
            yield ok("ports", f"{text} is free")
        elif busy.process is not None and busy.process.pid in ours:
            yield ok("ports", f"{text} is used by this cluster")
        else:
            yield fail("ports", f"{text} is in use", str(busy))


def _ray_processes() -> Iterator[int]:
    """Yield the processes of Ray clusters that Tandem did not start."""
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or ())])
        is_rays = any(name in words for name in ("gcs_server", "haproxy", "ray::", "ray/dashboard"))
        if is_rays and not processes.environment_of(process.pid):
            yield process.pid


def check_processes(
    home: Path,
    owned: list[processes.ClusterProcess],
    known: state.ClusterState | None = None,
    *,
    alive: bool,
) -> Iterator[Finding]:
    if known is not None and not owned:
        yield ok("processes", f"a cluster that Tandem did not start runs at {known.ray_address}")
    elif not owned:
        yield ok("processes", "no cluster is running")
    elif alive:
        yield ok("processes", f"a cluster is running with {len(owned)} processes")
    else:
        names = processes.describe([process.process for process in owned[:5]])
        text = f"{len(owned)} processes left over from a crashed cluster: {names}"
        yield fail("processes", text, "End them with `tandem down`.")
    for other, count in _headless_elsewhere(home).items():
        text = f"{count} processes left over from a crashed cluster with home {other}"
        yield warn("processes", text, f"End them with `TANDEM_HOME={other} tandem down`.")


def _headless_elsewhere(home: Path) -> dict[str, int]:
    homes = {
        other
        for pid in psutil.pids()
        if (other := processes.environment_of(pid).get(processes.HOME)) and other != str(home)
    }
    owned = {other: processes.find(Path(other)) for other in homes}
    return {
        other: len(found)
        for other, found in owned.items()
        if found and not state.is_alive(found, state.load(Path(other)))
    }


def check_auth(variables: Mapping[str, str], loaded: LoadedConfig) -> Iterator[Finding]:
    mode = variables.get("RAY_AUTH_MODE", "").lower() or "disabled"
    if mode == "token" and ray_token(variables) is None:
        advice = "Set RAY_AUTH_TOKEN, or create ~/.ray/auth_token with `ray get-auth-token`."
        yield fail("authentication", "RAY_AUTH_MODE is token, but there is no token", advice)
    elif mode == "token":
        yield ok("authentication", "Ray requires a token (RAY_AUTH_MODE=token)")
    else:
        text = "Ray requires no token: every user of this machine can run jobs in the cluster"
        yield warn("authentication", text, "On shared machines, set RAY_AUTH_MODE=token.")
    if loaded.config.router.requires_keys:
        yield ok("authentication", "the router requires API keys")
    elif is_loopback(loaded.http_host):
        yield ok("authentication", "the router requires no API key, but listens on loopback only")
    elif loaded.config.router.open:
        text = f"anyone who reaches {loaded.http_host} can use the router (router.open is true)"
        advice = "Put a proxy that authenticates in front, or create keys with `tandem keys add`."
        yield warn("authentication", text, advice)
    else:
        text = f"the router listens on {loaded.http_host} without requiring an API key"
        yield fail("authentication", text, "Create a key with `tandem keys add TENANT`.")


def check_endpoints(running: state.ClusterState, home: Path) -> Iterator[Finding]:
    token = running.token(home)
    # The certificate may be for another name than this node's address.
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False, verify=False) as client:
        yield _check_router(client, running.http_url)
        if running.prometheus_url:
            yield _check_prometheus(client, running.prometheus_url)
        if running.grafana_url:
            yield _check_charts(client, running)
        url = f"{running.dashboard_url}{DISCOVERY_PATH}"
        try:
            response = anonymous = client.get(url)
            if token:
                response = client.get(url, headers={"authorization": f"Bearer {token}"})
        except httpx.HTTPError as error:
            text = f"Ray's dashboard at {running.dashboard_url} does not respond ({error!r})"
            yield fail("service discovery", text, "See dashboard.log (`tandem logs`).")
            return
    yield from check_token(token, anonymous, response)
    if not _is_denied(response):
        yield check_discovery(response)
    if date := response.headers.get("date"):
        yield check_skew(parsedate_to_datetime(date).timestamp() - time.time())


def _check_router(client: httpx.Client, url: str) -> Finding:
    advice = "See `tandem status` and `tandem logs`."
    try:
        response = client.get(f"{url}/ready")
    except httpx.HTTPError as error:
        return fail("router", f"no response at {url} ({error!r})", advice)
    if response.status_code == httpx.codes.OK:
        return ok("router", f"ready at {url}")
    text = f"a pool is not ready ({url}/ready has status {response.status_code})"
    return warn("router", text, advice)


def _check_prometheus(client: httpx.Client, url: str) -> Finding:
    advice = "See monitoring/prometheus.log in Tandem's home, and the runbook target-down.md."
    try:
        response = client.get(f"{url}/api/v1/targets", params={"state": "active"})
        targets = response.json()["data"]["activeTargets"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return fail("prometheus", f"no response at {url} ({error!r})", advice)
    down = sorted(target["scrapeUrl"] for target in targets if target["health"] == "down")
    if down or not targets:
        text = f"no response from {', '.join(down)}" if down else "no targets to scrape yet"
        return warn("prometheus", text, advice)
    return ok("prometheus", f"scraping {len(targets)} targets, at {url}")


def _check_charts(client: httpx.Client, running: state.ClusterState) -> Finding:
    name, log = ("Grafana", "grafana.log")
    if running.grafana_is_stand_in:
        name, log = "the stand-in for Grafana", "charts.log"
    url = running.grafana_url
    try:
        client.get(f"{url}/api/health").raise_for_status()
    except httpx.HTTPError as error:
        text = f"{name} does not respond at {url} ({error!r})"
        return fail("charts", text, f"See monitoring/{log} in Tandem's home.")
    return ok("charts", f"{name} responds at {url}")


def check_token(
    token: str | None, anonymous: httpx.Response, response: httpx.Response
) -> Iterator[Finding]:
    """Check this shell's token by responses of Ray's dashboard: without a token, and with it."""
    if _is_denied(response):
        text = f"the cluster rejects this shell's Ray token (status {response.status_code})"
        if token is None:
            text = "the cluster requires a Ray token, but this shell has none"
        advice = "Set RAY_AUTH_MODE=token and the RAY_AUTH_TOKEN the cluster was started with."
        yield fail("authentication", text, advice)
    elif _is_denied(anonymous):
        yield ok("authentication", "the cluster accepts this shell's Ray token")
    elif token is not None:
        text = "the cluster requires no token: it was started without RAY_AUTH_MODE=token"
        yield fail("authentication", text, "Restart it with RAY_AUTH_MODE=token.")


def _is_denied(response: httpx.Response) -> bool:
    return response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


def check_discovery(response: httpx.Response) -> Finding:
    try:
        groups: Any = response.json() if response.is_success else None
        targets = [target for group in groups for target in group["targets"]]
    except (ValueError, TypeError, KeyError):
        text = f"{DISCOVERY_PATH} returned status {response.status_code} and no targets"
        return fail("service discovery", text, "See dashboard.log (`tandem logs`).")
    if not targets:
        advice = "Wait a moment; Ray refreshes the list every 5 s."
        return warn("service discovery", "no targets for Prometheus", advice)
    return ok("service discovery", f"{len(targets)} targets for Prometheus")


def check_skew(skew_s: float) -> Finding:
    """Check the difference between the head node's clock and this machine's, in seconds."""
    text = f"the head node's clock is {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > MAX_SKEW_S:
        return warn("clock", text, "Synchronize the clocks of all nodes with NTP.")
    return ok("clock", f"{text}, within the resolution of {MAX_SKEW_S:g} s")


def clock_offset() -> float:
    """Return the difference between wall clock and monotonic clock, in seconds."""
    return time.time() - time.monotonic()


def check_clock_steps(step_s: float) -> Finding:
    """Check that the wall clock was not set, which changes the clock offset by ``step_s``."""
    if abs(step_s) > MAX_STEP_S:
        text = f"the wall clock jumped by {step_s:+.2f} s during this check"
        advice = "Let NTP slew the clock. Timestamps in logs and charts are wrong until then."
        return warn("clock", text, advice)
    return ok("clock", "the wall clock runs steadily")
