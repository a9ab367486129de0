"""``serve deploy ray-config.yaml`` on a cluster that ``ray start`` made (how-to/deploy.md)."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import link_models
from tests.running import ROOT, TANDEM, isolated_home

pytestmark = pytest.mark.timeout(600)

READY_TIMEOUT_S = 240
_VARIABLE = re.compile(r"^\| `(RAY_\w+)` \| `(\S+)` \|", re.MULTILINE)


@pytest.fixture(scope="module")
def deployed_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a node with Ray's own commands, deploy the file, and yield the URL of the routers."""
    home = link_models(tmp_path_factory.mktemp("home"))
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text("utf-8")
    token = home / "auth_token"
    token.write_text("0123456789abcdef" * 2, encoding="ascii")
    secured = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env, settings, url, _ = isolated_home(home, **dict(_VARIABLE.findall(page)), **secured)
    http, gcs, dashboard = (setting.rsplit("=", 1)[1] for setting in settings[1::2])
    file = home / "ray-config.yaml"
    text = (ROOT / "ray-config.yaml").read_text("utf-8")
    assert text.count("port: 8000") == 1
    file.write_text(text.replace("port: 8000", f"port: {http}"), encoding="utf-8")
    ray, serve = TANDEM.with_name("ray"), TANDEM.with_name("serve")
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
    start = [ray, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    sizes = ["--object-store-memory=100000000", "--disable-usage-stats"]
    log = (home / "ray.log").open("w")
    node = subprocess.Popen([*start, *ports, *sizes], env=env, stdout=log, stderr=log)
    try:
        # Without the token, the dashboard refuses; then it is up.
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", home / "ray.log", status=401)
        command = [serve, "deploy", "-a", f"http://127.0.0.1:{dashboard}", file]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        wait_for(f"{url}/ready", home / "ray.log")
        yield url
    finally:
        node.terminate()  # with --block, stops all processes of the node
        node.wait(60)
        log.close()


def wait_for(url: str, log: Path, status: int = 200) -> None:
    """Wait until a URL answers with ``status``."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    last: Any = None
    while time.monotonic() < deadline:
        try:
            if (last := httpx.get(url, timeout=5)).status_code == status:
                return
        except httpx.HTTPError as error:
            last = error
        time.sleep(0.5)
    pytest.fail(f"no {status} from {url}: {last!r}\n{log.read_text('utf-8')}")


def test_both_default_models_answer(deployed_url: str) -> None:
    with httpx.Client(base_url=deployed_url, timeout=120) as http:
        chat = http.post(
            "/v1/chat/completions",
            json={
                "model": "smollm2",
                "temperature": 0,
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
            },
        )
        labels = http.post("/classify", json={"model": "sentiment", "input": ["I loved it."]})
    assert "Paris" in chat.raise_for_status().json()["choices"][0]["message"]["content"]
    assert labels.raise_for_status().json()["data"][0]["label"] == "POSITIVE"
