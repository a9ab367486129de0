import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli.background_builds import BackgroundBuilds
from cluster.config import TandemConfig
from cluster.errors import BuildError
from cluster.launch import processes
from cluster.models.build import is_building

MODEL = "sentiment-minilm"
CONFIG = TandemConfig.model_validate({"classifiers": [{"name": "sentiment", "model": MODEL}]})

# A build that takes its lock, prints a step and waits until the test creates a file.
BUILD = """
import fcntl, os, sys, time
from pathlib import Path
models = Path(os.environ["TANDEM_HOME"], "models")
models.mkdir(parents=True, exist_ok=True)
lock = open(models / f".{sys.argv[1]}.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(f"{sys.argv[1]}: training, epoch 1 of 1", flush=True)
while not (models / "go").exists():
    time.sleep(0.01)
sys.exit("error: no space left" if (models / "go").read_text() == "fail" else 0)
"""
COMMAND = (sys.executable, "-c", BUILD)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    return tmp_path / "models"


def test_a_running_build_is_shown_and_holds_the_lock_for_which_replicas_wait(models: Path) -> None:
    with BackgroundBuilds(CONFIG, COMMAND) as builds:
        assert builds.names == [MODEL]
        assert is_building(MODEL)
        while "starting" in (steps := builds.check())[MODEL]:
            pass
        assert steps == {MODEL: "training, epoch 1 of 1"}
        (models / "go").write_text("succeed")
        builds.finish(Console(quiet=True))
        assert builds.check() == {}
    assert not is_building(MODEL)


def test_a_failed_build_fails_the_start(models: Path) -> None:
    with BackgroundBuilds(CONFIG, COMMAND) as builds:
        (models / "go").write_text("fail")
        with pytest.raises(BuildError, match=r"no space left \(log: .*build-sentiment-minilm.log"):
            builds.finish(Console(quiet=True))


def test_a_start_that_ends_early_ends_its_builds() -> None:
    with BackgroundBuilds(CONFIG, COMMAND):
        assert is_building(MODEL)
    assert not is_building(MODEL)


def test_a_build_that_ends_at_once_is_reported() -> None:
    command = (sys.executable, "-c", "raise SystemExit('error: bad')")
    with (
        BackgroundBuilds(CONFIG, command) as builds,
        pytest.raises(BuildError, match=r": bad \(log"),
    ):
        builds.finish(Console(quiet=True))


def test_nothing_is_started_if_all_models_are_built() -> None:
    pool = {"name": "g", "model": "g", "engine": "sim"}
    config = TandemConfig.model_validate({"generators": [pool]})
    with BackgroundBuilds(config, ("/does/not/exist",)) as builds:
        assert builds.names == []
        assert builds.check() == {}


def test_the_start_does_not_take_builds_for_leftovers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_ID", "of-a-parent")
    with BackgroundBuilds(CONFIG, COMMAND):
        assert processes.find(tmp_path) == []


def test_training_has_a_low_priority() -> None:
    with BackgroundBuilds(CONFIG, COMMAND):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert 10 in {os.getpriority(os.PRIO_PROCESS, int(pid)) for pid in children}
