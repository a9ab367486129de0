"""Every command and every piece of Python in the README, run against a real cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, RunningCluster

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
# What sets up, starts and tests everything is run by .ci/run itself.
NOT_HERE = ("./scripts/up", "./scripts/test")
COMMANDS = [(kind, code) for kind, code in BLOCKS if not code.startswith(NOT_HERE)]


@pytest.mark.parametrize(("kind", "code"), COMMANDS, ids=lambda value: value[:60])
def test_a_block_of_the_readme(cluster: RunningCluster, kind: str, code: str) -> None:
    code = code.replace("http://127.0.0.1:8000", cluster.http_url)
    # Fail where HTTP does, which a shell that pastes the command does not need.
    code = code.replace("curl -s", "curl --fail-with-body -sS")
    command = ["bash", "-euo", "pipefail", "-c", code]
    if kind == "python":
        command = [sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(sys.executable).parent), cluster.env["PATH"]])
    done = subprocess.run(
        command,
        env={**cluster.env, "PATH": path, "RAY_ADDRESS": cluster.ray_address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout
    if code.count("curl") == 1 and "data: " not in done.stdout:
        assert "error" not in json.loads(done.stdout)
