"""Runs a script of Ray with longer pauses: ``python -m cluster.launch.ray_helper SCRIPT OPTION``.

Ray has no settings for these pauses, and its processes wake up in them although nothing happens.
"""

import asyncio
import runpy
import sys
import time
from pathlib import Path
from typing import Any

LOG_PAUSE_S = 0.5
"""Pause of the log monitor while no log grows, by default 0.1 s: delay of a line on its way to the
terminal of a Ray job."""
HEALTH_PAUSE_S = 10.0
"""Pause between two checks of a dashboard module, by default 1 s. Ray restarts one that hangs."""


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
        await asyncio.sleep(HEALTH_PAUSE_S)

    SubprocessModuleHandle._do_once_health_check = check_and_pause


if __name__ == "__main__":
    del sys.argv[0]
    lengthen_pauses(Path(sys.argv[0]).name)
    runpy.run_path(sys.argv[0], run_name="__main__")
