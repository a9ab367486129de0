"""When vLLM's engine process is forked, and its title."""

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from cluster.config import GeneratorConfig
from cluster.engines.vllm import forking


def make_config(**fields: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate({"name": "g", "model": "m", **fields})


def test_a_single_worker_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert forking.may_fork({}, make_config())
    assert not forking.may_fork({}, make_config(tensor_parallel_size=2))
    assert not forking.may_fork({forking.METHOD_VARIABLE: "spawn"}, make_config())


def test_a_process_that_has_loaded_pytorch_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not forking.may_fork({}, make_config())


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
