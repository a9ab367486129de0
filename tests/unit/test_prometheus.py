"""Preparations for starting Prometheus."""

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from cluster.config import RouterConfig
from cluster.errors import StartError
from cluster.launch import prometheus
from cluster.launch.state import ClusterState


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
def test_routers_that_require_a_key_are_not_scraped(tmp_path: Path, keys: dict[str, Any]) -> None:
    requires_keys = RouterConfig.model_validate(keys).requires_keys
    known = ClusterState("id", "tandem", "http://127.0.0.1:8000", "http://d", "", "", 0.0)
    targets = prometheus.scrape_targets(known, tmp_path, requires_keys=requires_keys)
    assert targets.ingress == (None if keys else "127.0.0.1:8000")


def test_rays_token_file_is_readable_by_the_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert prometheus.write_token_file(tmp_path) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    for _ in range(2):  # a second start writes it again
        path = prometheus.write_token_file(tmp_path)
        assert path is not None
        assert Path(path).read_text() == "a-token"
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
