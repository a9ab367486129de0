"""The full cluster as ``tandem up`` starts it: HAProxy, router, link, replica; with an API key."""

import contextlib
import hashlib
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.endpoint import Endpoint
from benchmarks.targets.home import free_ports, new_home
from benchmarks.targets.running import MODEL, Running, generator
from cluster.models.store import models_dir

READY_S = 300.0


def tandem(decode_s: float) -> AbstractContextManager[Running]:
    """One router and one replica of the simulated engine."""
    return tandem_of({"generators": [generator(decode_s)]}, MODEL)


@dataclass(frozen=True, slots=True)
class Beside:
    """A further application of the same cluster, with the same pools and router."""

    path: str
    """Below which it answers, as ``/traced``."""
    import_path: str
    args: Mapping[str, Any]
    """More of its configuration."""


@contextlib.contextmanager
def tandem_of(
    pools: Mapping[str, Any],
    model: str,
    router: Mapping[str, Any] | None = None,
    beside: Sequence[Beside] = (),
) -> Iterator[Running]:
    """One router and these pools, of which ``model`` is asked for; the user's own models.

    ``router`` is more of its configuration.
    """
    key = secrets.token_urlsafe(24)
    http, gcs, dashboard, stats, metrics, fallback = free_ports(6)
    args: dict[str, object] = {
        **pools,
        "router": {
            "api_keys_sha256": [hashlib.sha256(key.encode()).hexdigest()],
            "replicas": {"min": 1, "max": 1},
            **(router or {}),
        },
        "cluster": {"ray_port": gcs, "dashboard_port": dashboard},
    }
    applications = [_application("/", "deployments.app:build", args)]
    applications += [_application(b.path, b.import_path, {**args, **b.args}) for b in beside]
    with new_home("tandem") as home:
        (home.path / "models").symlink_to(models_dir())
        config = home.path / "config.yaml"
        config.write_text(_serve_config(http, applications), encoding="utf-8")
        home.run(
            Path(sys.executable).with_name("tandem"), "up", "-d", "--config", config,
            timeout_s=READY_S,
            environment=haproxy_ports(stats, metrics, fallback),
        )  # fmt: skip
        endpoint = Endpoint(http, model, {"authorization": f"Bearer {key}"})
        for path in ("", *(b.path for b in beside)):
            home.wait_ready(endpoint, READY_S, f"{path}/v1/models")
        # Ray takes 127.0.0.1 for the machine's outward address, where this Ray does not listen.
        yield Running(endpoint, home, ray_address=f"LOCALHOST:{gcs}")


def haproxy_ports(stats: int, metrics: int, fallback: int) -> dict[str, str]:
    """Serve's settings of the ports that HAProxy opens beside the one for requests."""
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
