"""Runs scripts of Ray: ``python -P -m cluster.launch.ray_helper SCRIPTS SCRIPT OPTION``.

``SCRIPTS`` is JSON: more scripts with their options. Their processes are forks of this one,
which has imported Ray, so they share its memory. The pauses of their loops are longer: Ray has no
settings for these, and its processes wake up in them although nothing happens. For the same reason,
most of the dashboard's modules, which are processes, start with the first request to them.
"""

import asyncio
import gc
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

LOG_PAUSE_S = 0.5
"""Pause of the log monitor while no log grows, by default 0.1 s: delay of a line on its way to the
terminal of a Ray job."""
HEALTH_PAUSE_S = 10.0
"""Pause between two requests to a dashboard module for its health, by default 1 s."""
LAG_PAUSE_S = 5.0
"""Pause between two measurements of the delay of the dashboard's event loop, by default 0.25 s."""
EAGER_MODULES = ("ReportHead",)
"""Modules that start with the dashboard: this one writes the file that Prometheus reads."""
START_TIMEOUT_S = 60.0
"""Maximum time for the start of a module, in seconds."""
_EXIT_PAUSE_S = 2.0  # between two looks whether it has exited


def lengthen_pauses(script: str) -> None:
    """Lengthen the pauses of the script that this process will run."""
    if script == "log_monitor.py":
        sleep = time.sleep
        time.sleep = lambda pause_s: sleep(max(float(pause_s), LOG_PAUSE_S))
    elif script == "dashboard.py":
        _check_modules_less_often()
        _measure_lag_less_often()
        _start_modules_on_demand()


def _check_modules_less_often() -> None:
    from cluster.ray_internals import SubprocessModuleHandle

    check = SubprocessModuleHandle._do_once_health_check

    async def check_and_pause(self: Any) -> None:
        await check(self)
        for _ in range(int(HEALTH_PAUSE_S / _EXIT_PAUSE_S)):
            await asyncio.sleep(_EXIT_PAUSE_S)
            if self.process.exitcode is not None:
                return  # the next check reports it

    SubprocessModuleHandle._do_once_health_check = check_and_pause


def _measure_lag_less_often() -> None:
    from ray.dashboard import head

    measure = head.enable_monitor_loop_lag
    head.enable_monitor_loop_lag = lambda callback: measure(callback, interval_s=LAG_PAUSE_S)


def _start_modules_on_demand() -> None:
    """Let the first request to a module of the dashboard start its process, except eager ones."""
    from cluster.ray_internals import DashboardHead, SubprocessModuleHandle

    start, wait_ready = (
        SubprocessModuleHandle.start_module,
        SubprocessModuleHandle.wait_for_module_ready,
    )
    proxy, record = SubprocessModuleHandle.proxy_request, DashboardHead._record_dashboard_metrics
    starts: WeakKeyDictionary[Any, asyncio.Task[None]] = WeakKeyDictionary()

    async def start_and_wait(handle: Any) -> None:
        try:
            await asyncio.to_thread(start, handle)  # the first one imports the modules
            await asyncio.to_thread(handle.parent_conn.poll, START_TIMEOUT_S)
            wait_ready(handle)
        except Exception:
            del starts[handle]
            await handle.destroy_module()
            raise

    def is_eager(handle: Any) -> bool:
        return handle.module_cls.__name__ in EAGER_MODULES

    async def proxy_request(handle: Any, *arguments: Any) -> Any:
        if not is_eager(handle):
            if handle not in starts:
                starts[handle] = asyncio.create_task(start_and_wait(handle))
            await asyncio.shield(starts[handle])  # other requests wait for it, too
        return await proxy(handle, *arguments)

    def unless_first(call: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda handle: call(handle) if is_eager(handle) or handle in starts else None

    async def record_started(head: Any, handles: Iterable[Any]) -> None:
        await record(head, _Started(handles))

    SubprocessModuleHandle.start_module = unless_first(start)
    SubprocessModuleHandle.wait_for_module_ready = unless_first(wait_ready)
    SubprocessModuleHandle.proxy_request = proxy_request
    DashboardHead._record_dashboard_metrics = record_started


class _Started:
    """The dashboard's modules that have a process, at the time of each iteration."""

    def __init__(self, handles: Iterable[Any]) -> None:
        self._handles = handles

    def __iter__(self) -> Iterator[Any]:
        return (handle for handle in self._handles if handle.process is not None)


def fork_for(scripts: Iterable[list[str]], own: list[str]) -> list[str]:
    """Fork a process for each script; return the one that this process is to run."""
    gc.freeze()  # otherwise a collection would copy the memory that the processes share
    return next((script for script in scripts if os.fork() == 0), own)


def main(scripts: str, *own: str) -> None:
    from cluster.ray_internals import LogMonitor, setproctitle  # noqa: F401  # before the forks

    sys.argv = fork_for(json.loads(scripts), list(own))
    path = Path(sys.argv[0])
    setproctitle(path.name)
    lengthen_pauses(path.name)
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
