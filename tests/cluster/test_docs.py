"""The commands and Python code in README and the documentation, run against a real cluster.

Blocks marked ``bash`` or ``python`` are run. Blocks marked ``sh`` are not: they start or stop a
cluster, need another model or other files. ``test_speech.py`` runs those about speech. Runbooks
need Prometheus; ``test_monitoring.py`` covers their queries.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, RunningCluster

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# .ci/run itself runs these.
COVERED_BY_CI = ("./scripts/up", "./scripts/test", "./scripts/check")
# Each block once, under the first page that has it.
BLOCKS = {
    (kind, code): f"{page.stem}: {code.splitlines()[0][:60]}"
    for page in reversed(PAGES)
    if page.parent.name != "runbooks" and page.stem != "speech"
    for kind, code in BLOCK.findall(page.read_text(encoding="utf-8"))
    if not code.startswith(COVERED_BY_CI)
}


@pytest.mark.parametrize(("kind", "code"), BLOCKS.keys(), ids=BLOCKS.values())
def test_code_block_runs(cluster: RunningCluster, kind: str, code: str) -> None:
    code = code.replace("http://127.0.0.1:8000", cluster.http_url)
    # A reader sees an HTTP error in the output; the test must fail on it.
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
