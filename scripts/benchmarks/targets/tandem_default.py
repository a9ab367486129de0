"""The full cluster with the default configuration: what ``./scripts/up`` starts."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.endpoint import Endpoint, TargetError
from benchmarks.targets.first_token import NAME, READY_S, Ready, wait_first_token
from benchmarks.targets.home import ROOT, free_ports, new_home
from benchmarks.targets.running import Running
from benchmarks.targets.tandem import haproxy_ports
from cluster.models.store import home as cache

OWN = {"run", "bench"}
"""What a home does not share with the cache: the state of a running cluster, and peers."""


@contextlib.contextmanager
def tandem_default() -> Iterator[Ready]:
    """A cluster of its own, on ports of its own, with the models and caches of the user."""
    http, gcs, dashboard, *others = free_ports(6)
    settings = {
        "http_options.port": http,
        "cluster.ray_port": gcs,
        "cluster.dashboard_port": dashboard,
    }
    words = [word for path, port in settings.items() for word in ("--set", f"{path}={port}")]
    tandem = str(Path(sys.executable).with_name("tandem"))
    with new_home("default") as home:
        _share_cache(home.path)
        endpoint = Endpoint(http, NAME)
        began = time.monotonic()
        up = home.spawn(
            *(tandem, "up", "-d"),
            *("--config", str(ROOT / "ray-config.yaml")),
            *words,
            environment=haproxy_ports(*others),
        )
        wait_first_token(home, endpoint, "/health")
        ready_s = time.monotonic() - began
        if up.wait(READY_S):
            raise TargetError(f"tandem up ended with {up.returncode}")
        yield Ready(Running(endpoint, home, ray_address=f"LOCALHOST:{gcs}"), ready_s)


def _share_cache(home: Path) -> None:
    for entry in cache().iterdir():
        if entry.name not in OWN:
            (home / entry.name).symlink_to(entry)
