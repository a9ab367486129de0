"""Runs scripts of Ray: ``python -P -m cluster.launch.ray_helper SCRIPTS SCRIPT OPTION``.

``SCRIPTS`` is JSON: more scripts with their options. Their processes are forks of this one,
which has imported Ray, so they share its memory. The pauses of their loops are longer: Ray has no
settings for these, and its processes wake up in them although nothing happens.
"""

import asyncio
import gc
import json
import os
import runpy
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOG_PAUSE_S = 0.5
"""Pause of the log monitor while no log grows, by default 0.1 s: delay of a line on its way to the
terminal of a Ray job."""
HEALTH_PAUSE_S = 10.0
"""Pause between two requests to a dashboard module for its health, by default 1 s."""
_EXIT_PAUSE_S = 2.0  # between two looks whether it has exited


def lengthen_pauses(script: str) -> None:
    """Lengthen the pauses of the script that this process will run."""
    if script == "log_monitor.py":
        sleep = time.sleep
        time.sleep = lambda pause_s: sleep(max(float(pause_s), LOG_PAUSE_S))
    elif script == "dashboard.py":
        _check_modules_less_often()


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
