"""End of an engine whose worker process has died.

vLLM 0.32 notices the death of a worker, too, but reports it only when the other workers have ended.
They wait for the dead one, in a loop or in a kernel, and ignore SIGTERM; after nine seconds, vLLM
kills them.
"""

import logging
import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

import psutil

logger = logging.getLogger(__name__)

_POLL_S = 1.0
"""Time after which the thread ends once the engine stops."""
_WORKER_MARKS = ("multiprocessing.spawn", "VLLM::Worker")
"""In the command line of a worker, before and after it sets its title, which may fail. Other
children of an engine are multiprocessing's resource tracker and compilers."""


def watch_workers(cores: Sequence[psutil.Process], is_stopping: Callable[[], bool]) -> None:
    """Kill an engine's processes when one of their workers dies; return at once.

    The kernel then kills the other workers (``lifeline``), and requests fail over.

    Args:
        cores: Processes whose children are workers.
        is_stopping: Returns True once workers are expected to end.
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        return
    descriptors = ExitStack()
    poll = select.poll()
    num_workers = 0
    for worker in _workers_of(cores):
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(worker.pid)
            descriptors.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
            num_workers += 1

    def watch() -> None:
        with descriptors:
            while not is_stopping():
                if poll.poll(_POLL_S * 1000):
                    if not is_stopping():
                        _kill(cores)
                    return

    if num_workers:
        threading.Thread(target=watch, name="vllm-worker-watch", daemon=True).start()


def _workers_of(cores: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for core in cores:
        with suppress(psutil.NoSuchProcess):
            for child in core.children():
                command = " ".join(child.cmdline())
                if any(mark in command for mark in _WORKER_MARKS):
                    yield child


def _kill(cores: Sequence[psutil.Process]) -> None:
    alive = [core for core in cores if _is_alive(core)]
    if len(alive) == len(cores):  # otherwise, the workers died with their core
        logger.error("A worker process of vLLM has died; its engine is ended.")
    for core in alive:
        with suppress(psutil.NoSuchProcess):
            core.kill()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
