"""Full Tandem cluster as ``tandem up`` starts it: HAProxy, router, link, replicas."""

import contextlib
import hashlib
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.ports import free_ports
from benchmarks.targets.home import ROOT, Home, format_command, new_home
from benchmarks.targets.running import (
    MAX_STREAMS,
    READY_S,
    REAL_MODEL,
    SIM_MODEL,
    ReadyTarget,
    RunningTarget,
    sim_generator,
    wait_first_token,
)
from cluster.models.store import home as cache
from cluster.models.store import models_dir

TANDEM = Path(sys.executable).with_name("tandem")
SHARED = ("models", "downloads", "agreement")
"""Entries of the cache directory that a home shares. The others are a cluster's state, or the
user's: a default cluster would require the keys and run the batches."""

NUM_PORTS = 6
"""Ports of a cluster: of HTTP, GCS and dashboard, and three of HAProxy."""


@dataclass(frozen=True, slots=True)
class ExtraApplication:
    """Further Serve application in the same cluster, with the same pools and router."""

    path: str
    """Route prefix, such as ``/traced``."""
    import_path: str
    args: Mapping[str, Any]
    """Configuration that is added to that of the main application."""


def tandem(decode_s: float) -> AbstractContextManager[RunningTarget]:
    """Run one router and one replica of the simulated engine."""
    router = {"max_connections_per_address": 2 * MAX_STREAMS}
    return tandem_with_pools({"generators": [sim_generator(decode_s)]}, SIM_MODEL, router)


def tandem_without_handover(decode_s: float) -> AbstractContextManager[RunningTarget]:
    """Run the same cluster, but keep nothing of answers for their hand-over."""
    router = {"handover": {"enabled": False}}
    return tandem_with_pools({"generators": [sim_generator(decode_s)]}, SIM_MODEL, router)


@contextlib.contextmanager
def tandem_with_pools(
    pools: Mapping[str, Any],
    model: str,
    router: Mapping[str, Any] | None = None,
    extra_applications: Sequence[ExtraApplication] = (),
    cluster: Mapping[str, Any] | None = None,
) -> Iterator[RunningTarget]:
    """Run one router with an API key and the given pools; models come from the user's store.

    ``model`` is the pool that requests name. ``router`` and ``cluster`` are added to these sections
    of the configuration.
    """
    ready_s = float((cluster or {}).get("ready_timeout_s", READY_S))
    key = secrets.token_urlsafe(24)
    http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
    args: dict[str, object] = {
        **pools,
        "router": {
            "api_keys_sha256": [hashlib.sha256(key.encode()).hexdigest()],
            "replicas": {"min": 1, "max": 1},
            **(router or {}),
        },
        "cluster": {"ray_port": gcs, "dashboard_port": dashboard, **(cluster or {})},
    }
    applications = [
        _application("/", "deployments.app:build", args),
        *(_application(a.path, a.import_path, {**args, **a.args}) for a in extra_applications),
    ]
    with new_home("tandem") as home:
        (home.path / "models").symlink_to(models_dir())
        config = home.path / "config.yaml"
        config.write_text(_serve_config(http, applications), encoding="utf-8")
        home.run(
            TANDEM, "up", "-d", "--config", config,
            timeout_s=ready_s,
            environment=_haproxy_ports(stats, metrics, fallback),
        )  # fmt: skip
        endpoint = Endpoint(http, model, {"authorization": f"Bearer {key}"})
        for path in ("", *(extra.path for extra in extra_applications)):
            home.wait_ready(endpoint, READY_S, f"{path}/v1/models")
        # Ray replaces 127.0.0.1 by the machine's outward address, where this Ray does not listen.
        yield RunningTarget(endpoint, home, ray_address=f"LOCALHOST:{gcs}")


@contextlib.contextmanager
def tandem_default() -> Iterator[ReadyTarget]:
    """Run the default configuration, as ``./scripts/up`` does, on other ports."""
    with new_home("default") as home:
        share_cache(home)
        yield start_default(home, TANDEM, "up")


def start_default(
    home: Home,
    *up: str | Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = READY_S,
    ports: Sequence[int] = (),
) -> ReadyTarget:
    """Start the default configuration on other ports with the command ``up``.

    ``ports`` are ``NUM_PORTS`` ports; by default, free ones are chosen.

    Raises:
        TargetError: The command failed, or there was no token within ``timeout_s``.
    """
    http, gcs, dashboard, *haproxy = ports or free_ports(NUM_PORTS)
    settings = {
        "http_options.port": http,
        "cluster.ray_port": gcs,
        "cluster.dashboard_port": dashboard,
    }
    options = [word for path, port in settings.items() for word in ("--set", f"{path}={port}")]
    endpoint = Endpoint(http, REAL_MODEL)
    began = time.monotonic()
    process = home.spawn(
        *(*up, "-d", "--config", ROOT / "ray-config.yaml", *options),
        environment={**_haproxy_ports(*haproxy), **(environment or {})},
    )
    wait_first_token(home, endpoint, "/health", timeout_s)
    ready_s = time.monotonic() - began
    if process.wait(timeout_s):
        raise TargetError(f"tandem up exited with {process.returncode}.")
    healthy_s = time.monotonic() - began
    running = RunningTarget(endpoint, home, ray_address=f"LOCALHOST:{gcs}")
    shown = format_command((*up, "-d", "--config", "ray-config.yaml"), {})
    return ReadyTarget(running, ready_s, f"{shown}  # on other ports", healthy_s)


def share_cache(home: Home) -> None:
    """Let a home use the built models of the user."""
    (cache() / "agreement").mkdir(parents=True, exist_ok=True)  # so that the first start fills it
    for entry in filter(Path.exists, map(cache().joinpath, SHARED)):
        (home.path / entry.name).symlink_to(entry)


def _haproxy_ports(stats: int, metrics: int, fallback: int) -> dict[str, str]:
    return {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
    }


def _application(path: str, import_path: str, args: Mapping[str, object]) -> dict[str, object]:
    return {
        "name": path.strip("/") or "tandem",
        "route_prefix": path,
        "import_path": import_path,
        "args": dict(args),
    }


def _serve_config(port: int, applications: list[dict[str, object]]) -> str:
    return yaml.safe_dump(
        {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": applications,
        }
    )
