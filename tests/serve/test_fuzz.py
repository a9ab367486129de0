"""First inputs of the link's fuzzer; ./scripts/fuzz runs it for longer."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("end", ["replica", "router"])
def test_a_hostile_peer_does_no_harm(end: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.link", end, "-runs=3000", "-seed=1"]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 3000 runs" in done.stderr
