"""An engine whose worker dies is killed at once, and only then."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from cluster.engines.vllm.worker_watch import watch_workers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs pidfd")

CORE = """
import subprocess, sys
marks = ("# from multiprocessing.spawn", "# from multiprocessing.spawn", "# compiler")
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600) " + mark])
            for mark in marks]
print(*(child.pid for child in children), flush=True)
sys.stdin.read()
"""
THREAD = "vllm-worker-watch"


class Engine:
    """Process with two workers and a compiler as its children."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.core = subprocess.Popen([sys.executable, "-c", CORE], text=True, **pipes)  # type: ignore[call-overload]
        *self.workers, self.compiler = map(
            psutil.Process, map(int, self.core.stdout.readline().split())
        )
        self.stopped = threading.Event()

    def watch(self) -> None:
        watch_workers([psutil.Process(self.core.pid)], self.stopped.is_set)


@pytest.fixture
def engine() -> Iterator[Engine]:
    started = Engine()
    yield started
    started.stopped.set()
    started.core.kill()
    for process in (*started.workers, started.compiler):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    started.core.communicate(timeout=60)
    wait_for_thread()


def wait_for_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(60)
            assert not thread.is_alive()


def test_an_engine_whose_worker_dies_is_killed(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.watch()
    engine.compiler.kill()
    engine.workers[1].kill()
    assert engine.core.wait(60) == -signal.SIGKILL
    assert "worker process of vLLM has died" in caplog.text


def test_only_the_death_of_a_worker_kills_an_engine(engine: Engine) -> None:
    engine.watch()
    engine.compiler.kill()
    engine.stopped.set()
    wait_for_thread()
    assert engine.core.poll() is None


def test_workers_may_die_once_the_engine_stops(engine: Engine) -> None:
    engine.watch()
    engine.stopped.set()
    engine.workers[0].kill()
    wait_for_thread()
    assert engine.core.poll() is None


def test_the_death_of_an_engine_is_not_reported_as_that_of_its_worker(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.watch()
    engine.core.kill()
    engine.core.wait(60)
    for worker in engine.workers:
        worker.kill()
    wait_for_thread()
    assert "has died" not in caplog.text


def test_an_engine_without_workers_is_not_watched(engine: Engine) -> None:
    watch_workers([psutil.Process(engine.workers[0].pid)], engine.stopped.is_set)
    assert THREAD not in [thread.name for thread in threading.enumerate()]
