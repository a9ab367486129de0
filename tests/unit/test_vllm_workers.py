"""Workers of a placement group belong to their replica: processes, devices, memory and CPU time."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from cluster.accounting.counters import ProcessTree
from cluster.engines.base import EngineWorker
from cluster.engines.vllm import workers
from cluster.engines.vllm.workers import describe_worker, find_workers
from cluster.leaks.watch import STARTED, resident_memory

# Forks and ends, so that its child is a descendant of nobody here.
ORPHAN = """
import os, sys, time
if os.fork():
    os._exit(0)
held = b"1" * (64 << 20)
print(os.getpid(), flush=True)
while True:
    sum(range(10_000))
"""


@pytest.fixture
def orphan() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait(60)
        yield pid
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def description(pid: int, **other: Any) -> dict[str, Any]:
    return {"pid": pid, "device": "GPU-a", "namespace": workers.process_namespace(), **other}


def test_a_worker_describes_its_own_process() -> None:
    assert describe_worker(None) == description(os.getpid(), device="")


class Llm:
    """``AsyncLLM`` whose workers describe themselves as given."""

    def __init__(self, *descriptions: dict[str, Any]) -> None:
        self.descriptions = descriptions
        self.asked: list[str] = []

    async def collective_rpc(self, method: str, timeout: float) -> list[dict[str, Any]]:
        self.asked.append(method)
        return list(self.descriptions)


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid


async def test_workers_elsewhere_and_descendants_are_left_out(orphan: int, child: int) -> None:
    elsewhere = description(1, namespace="other node")
    llm = Llm(description(orphan), description(child), elsewhere)
    assert await find_workers(llm, 3) == [EngineWorker(orphan, "GPU-a")]
    assert llm.asked == ["tandem_describe_worker"]


async def test_an_engine_with_one_worker_is_not_asked() -> None:
    llm = Llm()
    assert await find_workers(llm, 1) == []
    assert llm.asked == []


def test_memory_and_cpu_time_of_workers_count(orphan: int) -> None:
    assert resident_memory([orphan])[STARTED] > 64 * 2**20
    tree, alone = ProcessTree([orphan]), ProcessTree()
    tree.cpu_s(), alone.cpu_s()
    before = psutil.Process(orphan).cpu_times().user
    deadline = time.monotonic() + 120
    while psutil.Process(orphan).cpu_times().user < before + 0.2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tree.cpu_s() >= alone.cpu_s() + 0.1
    psutil.Process(orphan).kill()
    while resident_memory([orphan]).get(STARTED, 0) > 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert resident_memory([orphan]).get(STARTED, 0) == 0
