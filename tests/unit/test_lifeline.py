"""vLLM's plugin binds only processes that an engine spawned.

``tests/cluster/test_engine_processes.py`` kills a replica and checks that its processes end.
"""

import ctypes
import multiprocessing
import os
import sys
from types import SimpleNamespace

import pytest

from cluster.engines import lifeline


@pytest.fixture
def prctl_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Calls of prctl by a process that looks as if its parent had spawned it."""
    calls: list[tuple[int, ...]] = []
    library = SimpleNamespace(prctl=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    parent = SimpleNamespace(pid=os.getppid())
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    return calls


def test_a_process_without_a_spawning_parent_is_not_bound(
    monkeypatch: pytest.MonkeyPatch, prctl_calls: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    monkeypatch.setenv(lifeline.PARENT_VARIABLE, "1")
    lifeline.bind_to_parent()
    assert prctl_calls == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl exists on Linux only")
@pytest.mark.parametrize(
    ("value", "bound"), [("", False), ("x", False), (str(os.getpid()), False), ("1", True)]
)
def test_only_descendants_of_an_engine_are_bound(
    monkeypatch: pytest.MonkeyPatch, prctl_calls: list[tuple[int, ...]], value: str, bound: bool
) -> None:
    monkeypatch.setenv(lifeline.PARENT_VARIABLE, value)
    lifeline.bind_to_parent()
    assert bool(prctl_calls) is bound
