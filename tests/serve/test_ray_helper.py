"""Scripts of Ray run in forks of one process."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.launch.ray_helper import lengthen_pauses
from cluster.ray_internals import DashboardHead, SubprocessModuleHandle


def test_each_script_has_its_name_its_options_and_a_process(tmp_path: Path) -> None:
    scripts = [[str(tmp_path / f"{name}.py"), f"--{name}"] for name in ("first", "second", "own")]
    code = (
        "import os, sys\n"
        "line = ' '.join([__name__, *sys.argv, f'{os.getpid()}'])\n"
        "os.write(1, line.encode() + b'\\n')\n"  # at once, as the processes share the pipe
    )
    for script, _ in scripts:
        Path(script).write_text(code, encoding="utf-8")
    *forked, own = scripts
    command = [sys.executable, "-m", "cluster.launch.ray_helper", json.dumps(forked), *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [line.split() for line in process.stdout]  # until all processes have ended
    assert sorted(line[:3] for line in lines) == sorted(["__main__", *script] for script in scripts)
    pids = {line[1]: int(line[3]) for line in lines}
    assert pids[own[0]] == process.pid
    assert len({*pids.values()}) == len(scripts)


class Modules:
    """The dashboard's modules with fake processes, after ``lengthen_pauses``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.failures = 0
        """Starts that are to fail."""
        self.recorded: list[list[Any]] = []

        def start(handle: Any) -> None:
            handle.process = object()
            handle.parent_conn = SimpleNamespace(poll=lambda timeout: True)
            self.events.append("start")

        def wait_ready(handle: Any) -> None:
            if self.failures:
                self.failures -= 1
                raise RuntimeError("no module")
            self.events.append("ready")

        async def proxy(handle: Any, *request: Any) -> Any:
            self.events.append("request")
            return request

        async def destroy(handle: Any) -> None:
            handle.process = None
            self.events.append("destroy")

        async def record(head: Any, handles: Any) -> None:
            self.recorded.append(list(handles))

        fakes = {
            "start_module": start,
            "wait_for_module_ready": wait_ready,
            "proxy_request": proxy,
            "destroy_module": destroy,
            "_do_once_health_check": None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(SubprocessModuleHandle, name, fake)
        monkeypatch.setattr(DashboardHead, "_record_dashboard_metrics", record)
        monkeypatch.setattr("ray.dashboard.head.enable_monitor_loop_lag", None)
        lengthen_pauses("dashboard.py")

    def make(self, name: str = "Module") -> Any:
        """Return a module as the dashboard's start leaves it."""
        handle = SubprocessModuleHandle(asyncio.get_running_loop(), type(name, (), {}), None)
        handle.start_module()
        handle.wait_for_module_ready()
        return handle


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Modules:
    return Modules(monkeypatch)


async def test_the_first_request_starts_a_module_once(modules: Modules) -> None:
    handle = modules.make()
    assert modules.events == []
    answers = await asyncio.gather(handle.proxy_request("a"), handle.proxy_request("b"))
    assert answers == [("a",), ("b",)]
    assert modules.events == ["start", "ready", "request", "request"]
    handle.start_module()  # after a failed health check
    handle.wait_for_module_ready()
    assert modules.events[4:] == ["start", "ready"]


async def test_the_module_that_prometheus_needs_starts_with_the_dashboard(modules: Modules) -> None:
    handle = modules.make("ReportHead")
    assert modules.events == ["start", "ready"]
    assert await handle.proxy_request("a") == ("a",)
    assert modules.events == ["start", "ready", "request"]


async def test_a_request_after_a_failed_start_starts_the_module_again(modules: Modules) -> None:
    handle = modules.make()
    modules.failures = 1
    with pytest.raises(RuntimeError, match="no module"):
        await handle.proxy_request("a")
    assert await handle.proxy_request("b") == ("b",)
    assert modules.events == ["start", "destroy", "start", "ready", "request"]


async def test_a_client_that_leaves_does_not_stop_the_start(modules: Modules) -> None:
    handle = modules.make()
    leaving = asyncio.create_task(handle.proxy_request("a"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await handle.proxy_request("b") == ("b",)
    assert modules.events == ["start", "ready", "request"]


async def test_metrics_are_recorded_of_modules_that_run(modules: Modules) -> None:
    handle, other = modules.make(), modules.make()
    await handle.proxy_request("a")
    await DashboardHead._record_dashboard_metrics(None, [handle, other])
    assert modules.recorded == [[handle]]
