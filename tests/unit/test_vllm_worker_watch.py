"""An engine whose worker dies is killed at once, and only then."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.engines.vllm import worker_watch
from cluster.engines.vllm.worker_watch import watch_workers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs pidfd")

CORE = """
import subprocess, sys
marks = ("# from multiprocessing.spawn", "# from multiprocessing.spawn", "# compiler")
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600) " + mark],
                             stdout=subprocess.DEVNULL) for mark in marks]
print(*(child.pid for child in children), flush=True)
for line in sys.stdin:
    print(line, end="", flush=True)
"""
THREAD = "vllm-worker-watch"


class Engine:
    """Process with two workers and a compiler as its children; it repeats lines."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.core = subprocess.Popen([sys.executable, "-c", CORE], text=True, **pipes)  # type: ignore[call-overload]
        *self.workers, self.compiler = map(
            psutil.Process, map(int, self.core.stdout.readline().split())
        )
        self.stopped = threading.Event()
        self.checks = threading.Semaphore(0)

    def watch(self) -> None:
        watch_workers([psutil.Process(self.core.pid)], self._is_stopping)

    def _is_stopping(self) -> bool:
        stopping = self.stopped.is_set()
        self.checks.release()
        return stopping

    def wait_for_checks(self, number: int) -> None:
        """Wait until the watch has asked ``number`` more times whether the engine stops."""
        self.checks = threading.Semaphore(0)
        for _ in range(number):
            assert self.checks.acquire(timeout=60)

    def assert_lives(self) -> None:
        """Let the core answer: it could not after SIGKILL, even before its end can be seen."""
        self.core.stdin.write("alive\n")
        self.core.stdin.flush()
        assert self.core.stdout.readline() == "alive\n"


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


def kill_and_wait(process: psutil.Process) -> None:
    """Kill a process and wait until it is a zombie; its parent need not reap it."""
    descriptor = os.pidfd_open(process.pid)
    try:
        process.kill()
        assert select.select([descriptor], [], [], 60)[0]
    finally:
        os.close(descriptor)


def num_pidfds() -> int:
    """Return how many descriptors of processes this process has open."""
    links: list[str] = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(path.readlink()))
    return sum("pidfd" in link for link in links)


def test_an_engine_whose_worker_dies_is_killed(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.watch()
    engine.compiler.kill()
    engine.workers[1].kill()
    assert engine.core.wait(60) == -signal.SIGKILL
    assert "worker process of vLLM has died" in caplog.text


def test_only_the_death_of_a_worker_kills_an_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_watch, "POLL_S", 0.01)
    engine.watch()
    kill_and_wait(engine.compiler)
    # A watch that saw the compiler's end would ask twice at most: before and after.
    engine.wait_for_checks(3)
    engine.assert_lives()
    engine.workers[1].kill()
    assert engine.core.wait(60) == -signal.SIGKILL


def test_workers_may_die_once_the_engine_stops(engine: Engine) -> None:
    engine.watch()
    assert engine.checks.acquire(timeout=60)
    engine.stopped.set()
    engine.workers[0].kill()
    wait_for_thread()
    engine.assert_lives()


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


def test_a_vanished_child_does_not_hide_the_workers_after_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanished, watched = engine.workers
    cmdline = psutil.Process.cmdline

    def read_cmdline(process: psutil.Process) -> list[str]:
        if process.pid == vanished.pid:
            raise psutil.NoSuchProcess(process.pid)
        return cmdline(process)

    monkeypatch.setattr(psutil.Process, "cmdline", read_cmdline)
    engine.watch()
    watched.kill()
    assert engine.core.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EMFILE])
def test_workers_that_cannot_be_opened_are_not_watched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    refused = engine.workers[1].pid
    pidfd_open = os.pidfd_open
    num_opened = num_pidfds()

    def open_first(pid: int) -> int:
        if pid == refused:
            raise OSError(code, os.strerror(code))
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", open_first)
    engine.watch()
    assert THREAD not in [thread.name for thread in threading.enumerate()]
    assert f"Cannot watch vLLM's worker processes: [Errno {code}]" in caplog.text
    assert num_pidfds() == num_opened


def test_workers_whose_command_line_is_secret_are_not_watched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(process: psutil.Process) -> list[str]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", refuse)
    engine.watch()
    assert THREAD not in [thread.name for thread in threading.enumerate()]
    assert "Cannot watch vLLM's worker processes" in caplog.text
