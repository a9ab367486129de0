"""A start of vLLM's engine always ends: with the engine, or with an error and without processes."""

import asyncio
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import GeneratorConfig
from cluster.engines.vllm import launcher
from cluster.engines.vllm.launcher import LlmLauncher, StartedLlm


class FakeLlm:
    """``AsyncLLM`` whose engine is a process that does nothing."""

    def __init__(self) -> None:
        self.core = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(
                ctx=SimpleNamespace(destroy=lambda linger: None),
                engine_manager=SimpleNamespace(processes=[self.core]),
            )
        )

    def shutdown(self, timeout: float) -> None:
        self.core.kill()
        self.core.wait(timeout)


class FakeLauncher(LlmLauncher):
    """Launcher that starts ``FakeLlm``."""

    def __init__(self, llm: FakeLlm) -> None:
        config = GeneratorConfig.model_validate({"name": "g", "model": "m"})
        super().__init__(config, "m", {}, None)
        self._llm = llm

    def _start_llm(self, make_stat_loggers: Callable[[], list[Any]]) -> StartedLlm:
        return StartedLlm(self._llm, Namespace(), None)


@pytest.fixture
def llm() -> Iterator[FakeLlm]:
    fake = FakeLlm()
    yield fake
    fake.core.kill()
    fake.core.communicate(timeout=60)


async def test_an_engine_runs_until_it_is_stopped(llm: FakeLlm) -> None:
    engine = FakeLauncher(llm)
    async with asyncio.timeout(60):
        assert (await engine.start(list)).llm is llm
        assert llm.core.poll() is None
        await engine.stop()
    assert llm.core.returncode is not None


async def test_an_error_after_the_start_of_the_processes_ends_them_and_is_raised(
    llm: FakeLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch_workers(cores: Any, is_stopping: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(launcher, "watch_workers", watch_workers)
    engine = FakeLauncher(llm)
    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await engine.start(list)
        await engine.stop()
    assert llm.core.returncode is not None
