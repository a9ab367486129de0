"""vLLM's engine processes, found without their title.

setproctitle sets none where a process has changed the first variable of its environment, and the
order of the variables that Ray hands over differs from start to start. Elsewhere (without
SPT_NOENV) the title overwrites the environment, so that is no sign in every process either.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.engines.lifeline import PARENT_VARIABLE


def engines_of_this_process() -> list[psutil.Process]:
    """Those that this process, which starts nothing else, has started."""
    return list(without_trackers(psutil.Process().children()))


def engines_of_cluster(home: Path) -> list[psutil.Process]:
    """Those of the cluster whose TANDEM_HOME is ``home``."""
    found = []
    for process in without_trackers(list(psutil.process_iter())):
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            started_by_replica = environ.get(PARENT_VARIABLE) == str(process.ppid())
            if started_by_replica and environ.get("TANDEM_HOME") == str(home):
                found.append(process)
    return found


def without_trackers(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    """Those that are not multiprocessing's own helper."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                yield process
