"""Search for vLLM's engine processes, without relying on their titles.

setproctitle sets no title if a process has changed the first variable of its environment, and the
order of the variables that Ray passes varies between starts. Without SPT_NOENV, the title replaces
the environment, so not every process can be found by its environment either.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.engines.lifeline import PARENT_VARIABLE
from cluster.engines.vllm.forking import ENGINE_TITLE


def engines_of_this_process() -> list[psutil.Process]:
    """Return the engines started by this process, which must have no other children."""
    return list(without_trackers(psutil.Process().children()))


def engines_of_cluster(home: Path) -> list[psutil.Process]:
    """Return the engines of the cluster whose TANDEM_HOME is ``home``."""
    found = []
    for process in without_trackers(list(psutil.process_iter())):
        with contextlib.suppress(psutil.Error):
            environ = process.environ()
            # A forked engine has the environment with which its replica was started.
            started_by_replica = environ.get(PARENT_VARIABLE) == str(process.ppid()) or (
                " ".join(process.cmdline()).startswith(ENGINE_TITLE)
            )
            if started_by_replica and environ.get("TANDEM_HOME") == str(home):
                found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Return True if a process has ended, even if its parent has not noticed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def without_trackers(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    """Yield the processes that are not multiprocessing's resource tracker."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                yield process
