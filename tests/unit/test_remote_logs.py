"""``tandem logs`` on a cluster of several nodes, against a scripted dashboard of Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.launch import auth, processes, state
from cluster.launch.processes import ClusterProcess
from tests.unit.scripted_dashboard import scripted_dashboard

FAILED = {"id": "4f1", "outcome": "failed", "status": 503, "time": "2026-01-02"}
REQUESTS = "serve/tandem_requests_1_a.jsonl"
FILES = {
    ("n1", REQUESTS): json.dumps(FAILED, separators=(",", ":")),
    ("n2", "serve/replica_1.log"): "ERROR 2026-01-02 03:04:06,000 request 4f1 failed\n",
}
NAMES = {
    "n1": [REQUESTS, "serve/", "/etc/passwd", "serve/../../passwd"],
    "n2": ["serve/replica_1.log", "serve/rotated-away.log"],
}


def respond(path: str, authorization: str | None) -> tuple[int, bytes]:
    """Return the answer of a dashboard with two nodes, and a third one that does not answer."""
    url = urlsplit(path)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    node = query.get("node_id", "")
    found: Any
    if authorization != "Bearer secret":
        return 401, b""
    if url.path == "/api/v0/nodes":
        found = {"result": [{"node_id": f"n{i}", "node_ip": f"10.0.0.{i}"} for i in (1, 2, 3)]}
    elif node == "n3":
        return 500, b""
    elif url.path == "/api/v0/logs":
        found = {"serve": NAMES[node] if query["glob"] == "serve/*" else []}
    elif text := FILES.get((node, query["filename"])):
        return 200, text.encode()
    else:
        return 500, b"no such file"
    return 200, json.dumps({"data": {"result": found}}).encode()


@pytest.fixture
def dashboard() -> Iterator[str]:
    with scripted_dashboard(respond) as address:
        yield f"http://{address}"


@pytest.fixture
def node(dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home of a node that joined the cluster."""
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    auth.token_file(tmp_path).write_text("secret")
    known = state.ClusterState(
        *("id", "tandem", "http://h", dashboard, "10.0.0.1:6379", "", 0.0),
        is_head=False,
        address="10.0.0.2",
    )
    state.save(tmp_path, known)
    raylet = ClusterProcess(psutil.Process(), "raylet", "id")
    monkeypatch.setattr(processes, "find", lambda home: [raylet])
    return tmp_path


@pytest.mark.usefixtures("node")
def test_logs_of_all_nodes_are_shown_and_a_silent_node_is_named() -> None:
    done = CliRunner().invoke(app, ["logs", "--json"])
    found = json.loads(done.stdout)
    names = {f"10.0.0.1/{REQUESTS}", "10.0.0.2/serve/replica_1.log"}
    assert found["bytes"].keys() == names
    assert [group["last_id"] for group in found["failed_requests"]] == ["4f1"]
    assert [entry["file"] for entry in found["errors"]] == ["10.0.0.2/serve/replica_1.log"]
    assert "logs of node 10.0.0.3 cannot be read" in done.stderr


@pytest.mark.usefixtures("node")
def test_a_request_is_followed_over_the_nodes() -> None:
    shown = CliRunner().invoke(app, ["logs", "--request", "4f1"]).stdout.splitlines()
    files = [line for line in shown if not line.startswith(" ")]
    assert files == [f"10.0.0.1/{REQUESTS}", "10.0.0.2/serve/replica_1.log"]


def test_a_dashboard_that_rejects_the_token_is_reported(node: Path) -> None:
    auth.token_file(node).write_text("wrong")
    done = CliRunner().invoke(app, ["logs"])
    assert "does not list the nodes" in str(done.exception)
