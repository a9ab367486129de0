"""A cluster that others started: found by its raylet, shown by `status` and `doctor`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cluster import ray_internals
from cluster.cli import status
from cluster.cli.app import app
from cluster.config.file import IMPORT_PATH
from cluster.errors import UnavailableError
from cluster.launch import other_ray
from tests.unit.scripted_dashboard import scripted_dashboard

DETAILS = {
    "http_options": {"host": "0.0.0.0", "port": 8123},
    "applications": {
        "other": {"deployed_app_config": {"import_path": "other:app"}},
        "tandem": {
            "name": "tandem",
            "status": "RUNNING",
            "last_deployed_time_s": 1.0,
            "deployed_app_config": {"import_path": IMPORT_PATH},
            "deployments": {},
        },
    },
}


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Ray's dashboard with two applications."""
    with scripted_dashboard(lambda *_: (200, json.dumps(DETAILS).encode())) as address:
        yield address


@pytest.fixture
def ray_start(dashboard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A raylet that Tandem did not start."""
    cmdline = ["raylet", "--gcs-address=10.0.0.1:6379"]
    raylets = [
        SimpleNamespace(pid=1, info={"name": "raylet", "cmdline": command, "uids": uids})
        for command, uids in (
            (["raylet", "--gcs-address=10.6.6.6:6379"], SimpleNamespace(real=os.getuid() + 1)),
            (cmdline, SimpleNamespace(real=os.getuid())),
        )
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda *_: raylets)
    monkeypatch.setattr(ray_internals, "read_dashboard_address", lambda *_: dashboard)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("ray_start")
def test_status_shows_a_cluster_that_others_started() -> None:
    done = CliRunner().invoke(app, ["status", "--json"])
    found = json.loads(done.stdout)
    assert found["running"]
    assert found["application"]["status"] == "RUNNING"
    assert found["state"]["http_url"] == "http://127.0.0.1:8123"
    assert found["state"]["ray_address"] == "10.0.0.1:6379"
    assert "RUNNING" in CliRunner().invoke(app, ["status"]).stdout


@pytest.mark.usefixtures("ray_start")
def test_no_key_is_sent_to_a_router_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str | None] = []

    @contextmanager
    def connect(url: str, key: str | None, *, timeout_s: float) -> Iterator[None]:
        keys.append(key)
        raise UnavailableError(url)
        yield

    monkeypatch.setattr(status, "connect", connect)
    assert CliRunner().invoke(app, ["status", "--json", "--api-key", "secret"]).exit_code == 0
    assert keys == [None]


@pytest.mark.usefixtures("ray_start")
def test_no_cluster_runs_if_ray_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError("no token")

    monkeypatch.setattr(ray_internals, "read_dashboard_address", fail)
    assert json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout) == {"running": False}
    monkeypatch.setattr(ray_internals, "read_dashboard_address", lambda *_: None)
    assert other_ray.read_other_status() is None


def test_rays_address_of_the_environment_comes_first() -> None:
    assert other_ray.find_gcs_address({"RAY_ADDRESS": "10.0.0.2:6379"}) == "10.0.0.2:6379"
