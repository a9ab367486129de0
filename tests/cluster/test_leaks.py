"""Replicas that leak are drained and replaced, one at a time, and no request fails meanwhile."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.conftest import Running
from tests.cluster.test_scale import replicas, unbroken_load, until

LEAKS = {
    "sample_s": 0.5,
    "window_s": 10,
    "settle_s": 0,
    "min_bytes_per_s": 65536,
    "min_growth_bytes": "8MiB",
    "replace": True,
    "pause_s": 15,
}


def config() -> dict[str, Any]:
    sim = {
        "name": "sim",
        "model": "sim",
        "engine": "sim",
        "sim": {"decode_s_per_token": 0.02, "leak_bytes_per_request": "1MiB"},
        "replicas": {"min": 2, "max": 2},
        "resources": {"cpus": 0.1},
    }
    router = {"replicas": {"min": 1, "max": 1}, "resources": {"cpus": 0.1}}
    application = {
        "name": "tandem",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {"generators": [sim], "router": router, "leaks": LEAKS},
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }


@pytest.fixture(scope="module")
def leaking(make_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("config") / "leaks.yaml"
    file.write_text(yaml.safe_dump(config()), encoding="utf-8")
    running: Running = make_cluster("--config", str(file))
    yield running
    assert running.tandem("down").returncode == 0


def generators(cluster: Running) -> set[str]:
    deployments = cluster.status()["application"]["deployments"]
    return {
        replica["id"]
        for deployment in deployments
        if deployment["name"] == "generator-sim"
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def states(cluster: Running) -> list[str]:
    return [replica["state"] for replica in replicas(cluster)]


async def test_leaking_replicas_are_replaced_one_at_a_time(leaking: Running) -> None:
    before = generators(leaking)
    assert len(before) == 2
    fewest = 2
    with httpx.Client(base_url=leaking.http_url, timeout=60) as http:

        def replaced() -> bool:
            nonlocal fewest
            fewest = min(fewest, http.get("/ready").json()["pools"]["sim"]["ready"])
            return not before & generators(leaking)

        async with unbroken_load(leaking.http_url, streams=4):
            await until(replaced, 180, "the replacement of both")
    assert fewest >= 1


def test_all_replicas_run_then(leaking: Running) -> None:
    deadline = time.monotonic() + 120
    while set(states(leaking)) != {"RUNNING"}:  # the last one may still be stopping
        assert time.monotonic() < deadline, states(leaking)
        time.sleep(0.5)
