"""Start of Grafana, here a fake executable, and of its stand-in."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.ports import free_ports
from cluster.errors import StartError
from cluster.launch import charts, processes
from cluster.launch.doctor.running import check_endpoints
from cluster.launch.start import wait_for_http
from cluster.launch.state import ClusterState

FAKE_GRAFANA = """#!{python}
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        settings = {{name: value for name, value in os.environ.items() if name[:3] == "GF_"}}
        body = json.dumps({{"database": "ok", "settings": settings, "command": sys.argv}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    processes.end_all(tmp_path / "home", grace_s=5)


def make_state(**more: Any) -> ClusterState:
    port = free_ports(1)[0]
    return ClusterState(
        "id", "tandem", "http://127.0.0.1:8000", "http://127.0.0.1:8265", "", "", 0.0,
        prometheus_url="http://127.0.0.1:9", grafana_url=f"http://127.0.0.1:{port}", **more,
    )  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, processes.CLUSTER_ID: "id", processes.HOME: str(home)}


def start(home: Path, cluster: ClusterState, **more: str) -> Any:
    """Start charts and return the answer of their health check."""
    process = charts.start(home, cluster, {**environment(home), **more})
    url = f"{cluster.grafana_url}/api/health"
    wait_for_http(url, time.monotonic() + 120, process.check)
    process.detach()
    return httpx.get(url, timeout=60).json()


def install_grafana(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    executable = folder / "bin" / "grafana-server"
    executable.parent.mkdir(parents=True)
    executable.write_text(FAKE_GRAFANA.format(python=sys.executable))
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", str(executable.parent), prepend=os.pathsep)
    return executable


def test_an_installed_grafana_is_started_with_our_provisioning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = install_grafana(tmp_path / "grafana", monkeypatch)
    defaults = tmp_path / "grafana" / "conf" / "defaults.ini"
    defaults.parent.mkdir()
    defaults.touch()
    for _ in range(2):  # a second start replaces the files
        cluster = make_state()
        health = start(home, cluster, GF_USERS_DEFAULT_THEME="light")
    settings = health["settings"]
    assert health["command"][:3] == [str(executable), "--homepath", str(tmp_path / "grafana")]
    assert settings["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert settings["GF_SECURITY_ALLOW_EMBEDDING"] == "true"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert settings["GF_USERS_DEFAULT_THEME"] == "light"
    provisioning = Path(settings["GF_PATHS_PROVISIONING"])
    assert provisioning.is_relative_to(home)
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["name"], source["url"]) == ("Prometheus", cluster.prometheus_url)
    providers = yaml.safe_load((provisioning / "dashboards" / "tandem.yml").read_text())
    paths = {each["folder"]: Path(each["options"]["path"]) for each in providers["providers"]}
    assert list(paths["Tandem"].glob("*.json"))
    assert paths["Ray"] == home / "monitoring" / "ray-dashboards"
    assert list((provisioning / "alerting").glob("*.yml"))


def test_grafana_of_a_package_has_its_files_elsewhere(tmp_path: Path) -> None:
    assert charts.grafana_home(str(tmp_path / "grafana-server")) == charts.PACKAGED_HOME


def test_without_grafana_the_stand_in_runs_on_loopback_until_down(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "grafana_executable", lambda: None)
    cluster = make_state(grafana_is_stand_in=True)
    assert "stand-in" in start(home, cluster)["server"]
    boards = httpx.get(f"{cluster.grafana_url}/data/dashboards", timeout=60).json()
    assert {board["folder"] for board in boards} == {"Tandem"}
    policy = httpx.get(str(cluster.grafana_url), timeout=60).headers["content-security-policy"]
    assert "frame-ancestors http://127.0.0.1:8265 http://localhost:8265" in policy
    found = [each for each in check_endpoints(cluster, home) if each.check == "charts"]
    assert [(each.level, "stand-in" in each.message) for each in found] == [("ok", True)]
    (owned,) = processes.find(home)
    (listening,) = [c for c in owned.process.net_connections() if c.status == "LISTEN"]
    assert listening.laddr.ip == "127.0.0.1"
    assert processes.end_all(home, grace_s=20).terminated == 1
    found = [each for each in check_endpoints(cluster, home) if each.check == "charts"]
    assert [each.level for each in found] == ["fail"]


def test_a_failed_start_names_the_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "grafana_executable", lambda: None)
    with pytest.raises(StartError, match=r"the server of charts exited.*charts.log"):
        start(home, make_state(), PYTHONHOME="/nowhere")


def test_rays_dashboard_gets_the_address_of_the_charts() -> None:
    variables = charts.ray_variables("http://127.0.0.1:3000")
    assert variables["RAY_GRAFANA_HOST"] == variables["RAY_GRAFANA_IFRAME_HOST"]
    assert charts.frame_ancestors("http://10.0.0.1:8265")[0] == "http://10.0.0.1:8265"
