"""How Prometheus is started, up to its process."""

import shutil
import stat
from pathlib import Path

import pytest

from cluster.config import RouterConfig
from cluster.errors import StartError
from cluster.launch import prometheus


def test_a_missing_prometheus_is_said_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StartError, match="apt-get install --no-install-recommends prometheus"):
        prometheus.executable()


def test_rays_dashboard_is_told_where_prometheus_is(tmp_path: Path) -> None:
    told = prometheus.ray_variables(tmp_path, "http://127.0.0.1:9999")
    assert told["RAY_PROMETHEUS_HOST"] == "http://127.0.0.1:9999"
    assert told["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"].startswith(str(tmp_path))


def test_rays_token_is_written_for_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert prometheus.token_file(tmp_path) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
    for _ in range(2):  # a second start writes it again
        path = prometheus.token_file(tmp_path)
        assert path is not None
        assert Path(path).read_text() == "a-token"
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({}, "h:1"),
        ({"api_keys_sha256": ["0" * 64]}, None),
        ({"operator_keys_sha256": ["0" * 64]}, None),
        ({"keys_file": "keys.yaml"}, None),
    ],
)
def test_the_routers_address_is_asked_only_where_no_key_is_needed(
    keys: dict[str, object], asked: str | None
) -> None:
    assert prometheus.ingress(RouterConfig.model_validate(keys), "http://h:1") == asked
