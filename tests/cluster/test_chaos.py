"""The short form of ``./scripts/chaos`` meets its targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.faults import SHORT
from tests.cluster.conftest import ROOT

STALLED = 3
"""Factor by which a machine that also does other work may recover later."""


@pytest.mark.timeout(600)
def test_faults_cost_no_request(tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    done = subprocess.run(
        [sys.executable, "-m", "resilience.chaos", "--short", "--json", str(file)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert file.exists(), f"{done.stdout}\n{done.stderr}"
    result = json.loads(file.read_text("utf-8"))
    # The targets of recovery are those of a machine that does nothing else.
    missed = [
        f"{name}: {each}"
        for name, row in result["faults"].items()
        for each in row["missed"]
        if not each.startswith("recovery_s")
        or row["recovery_s"] > STALLED * row["target"]["recovery_s"]
    ]
    assert not missed, f"{missed}\n{done.stdout}\n{done.stderr}"
    assert result["faults"].keys() == set(SHORT)
    poisoned = result["faults"]["poison"]
    assert (result["failed"], result["diverged"]) == (poisoned["failed"], 0)
    # The router cannot tell requests that were lost with the poison twice from the poison.
    assert all("replicas were lost before they answered" in each for each in poisoned["errors"])
    assert result["requests"] > 100 * len(SHORT)
    assert not result["left"]
    assert any(process.startswith("router") for process in result["survivors"])
    assert result["restarted"] >= 5  # router, generator and engine; two or more by the update
