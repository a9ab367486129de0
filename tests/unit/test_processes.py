import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.launch import processes
from cluster.launch.processes import EndedProcesses

Spawn = Callable[..., subprocess.Popen[bytes]]
READY = "print('ready', flush=True); "
SLEEP = READY + "import time; time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str = SLEEP, **variables: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def mark(home: Path, cluster_id: str = "id") -> dict[str, str]:
    return {processes.CLUSTER_ID: cluster_id, processes.HOME: str(home)}


def found(home: Path) -> set[int]:
    return {owned.process.pid for owned in processes.find(home)}


def test_processes_are_found_by_cluster_id_and_home(tmp_path: Path, spawn: Spawn) -> None:
    ours = spawn(**mark(tmp_path))
    spawn()  # without a cluster id
    spawn(**mark(tmp_path / "other"))
    spawn(**{processes.HOME: str(tmp_path)})
    assert found(tmp_path) == {ours.pid}
    (owned,) = processes.find(tmp_path)
    assert owned.cluster_id == "id"


def test_a_grandchild_is_found_after_its_parent_exited(tmp_path: Path, spawn: Spawn) -> None:
    code = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], stdout=subprocess.PIPE, "
        "start_new_session=True); p.stdout.readline(); " + SLEEP
    )
    parent = spawn(code, **mark(tmp_path))
    assert len(found(tmp_path)) == 2
    parent.kill()
    parent.wait()
    (orphan,) = found(tmp_path)
    assert processes.end_all(tmp_path, grace_s=60) == EndedProcesses(terminated=1, killed=0)
    assert found(tmp_path) == set()
    assert orphan != parent.pid


def test_end_all_ends_only_processes_of_this_home(tmp_path: Path, spawn: Spawn) -> None:
    for number in range(3):
        spawn(**mark(tmp_path, f"cluster-{number}"))  # also of an earlier start
    decoys = [spawn(), spawn(**mark(tmp_path / "other"))]
    assert processes.end_all(tmp_path, grace_s=60) == EndedProcesses(terminated=3, killed=0)
    assert [decoy.poll() for decoy in decoys] == [None, None]


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, spawn: Spawn) -> None:
    stubborn = spawn(STUBBORN, **mark(tmp_path))
    assert processes.end_all(tmp_path, grace_s=0.2) == EndedProcesses(terminated=0, killed=1)
    assert stubborn.wait() == -signal.SIGKILL


def test_a_suspended_process_is_ended(tmp_path: Path, spawn: Spawn) -> None:
    stopped = spawn(**mark(tmp_path))
    stopped.send_signal(signal.SIGSTOP)
    os.waitpid(stopped.pid, os.WUNTRACED)  # before it has stopped, SIGTERM would end it
    assert processes.end_all(tmp_path, grace_s=0.2).killed == 1


def test_the_caller_and_its_ancestors_are_excluded(tmp_path: Path, spawn: Spawn) -> None:
    code = (
        "from pathlib import Path; from cluster.launch import processes; "
        f"print(len(processes.find(Path({str(tmp_path)!r}))), flush=True); " + SLEEP
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **mark(tmp_path)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"0\n"
    process.kill()
    process.communicate()


def test_end_all_without_processes(tmp_path: Path) -> None:
    assert processes.find(tmp_path) == []
    assert processes.end_all(tmp_path, grace_s=1) == EndedProcesses(terminated=0, killed=0)
