"""When a replica's process was made."""

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """How long ago this process was made, to a hundredth of a second.

    psutil tells it by the wall clock of the boot, which the kernel gives in whole seconds.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    ticks = int(fields[19])  # starttime, proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
