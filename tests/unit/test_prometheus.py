"""Preparations for starting Prometheus."""

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import RouterConfig
from cluster.errors import StartError
from cluster.launch import prometheus
from cluster.launch.auth import ray_token
from cluster.launch.state import ClusterState
from cluster.monitoring.prometheus import configuration


def test_a_missing_prometheus_is_reported_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StartError, match="apt-get install --no-install-recommends prometheus"):
        prometheus.executable()


def test_rays_dashboard_gets_the_address_of_prometheus(tmp_path: Path) -> None:
    variables = prometheus.ray_variables(tmp_path, "http://127.0.0.1:9999")
    assert variables["RAY_PROMETHEUS_HOST"] == "http://127.0.0.1:9999"
    assert variables["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"].startswith(str(tmp_path))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keys_file": "k"},
        {"api_keys_sha256": ["0" * 64]},
        {"operator_keys_sha256": ["0" * 64]},
    ],
)
def test_routers_that_require_a_key_are_scraped_with_the_one_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    requires_keys = RouterConfig.model_validate(keys).requires_keys
    known = ClusterState("id", "tandem", "http://127.0.0.1:8000", "http://d", "", "", 0.0)
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    prometheus.monitoring_dir(tmp_path).mkdir()
    targets = prometheus.scrape_targets(known, tmp_path, requires_keys=requires_keys)
    assert targets.ingress == (None if keys else "127.0.0.1:8000")
    monkeypatch.setenv("TANDEM_API_KEY", "operator")
    targets = prometheus.scrape_targets(known, tmp_path, requires_keys=requires_keys)
    jobs = yaml.safe_load(configuration(targets, []))["scrape_configs"]
    (ingress,) = [job for job in jobs if job["job_name"] == "ingress"]
    assert ingress["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    if keys:
        file = Path(ingress["authorization"]["credentials_file"])
        assert file.read_text() == "operator"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    else:
        assert "authorization" not in ingress


def test_rays_token_file_is_readable_by_the_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert prometheus.write_secret(tmp_path / "t", ray_token(os.environ)) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    for _ in range(2):  # a second start writes it again
        path = prometheus.write_secret(tmp_path / "t", ray_token(os.environ))
        assert path is not None
        assert Path(path).read_text() == "a-token"
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
