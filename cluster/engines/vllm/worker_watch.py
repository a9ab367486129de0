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

POLL_S = 1.0
"""Time after which the thread ends once the engine stops."""
_WORKER_MARKS = ("multiprocessing.spawn", "VLLM::Worker")
"""In the command line of a worker, before and after it sets its title, which may fail. Other
children of an engine are multiprocessing's resource tracker and compilers."""


def watch_workers(cores: Sequence[psutil.Process], is_stopping: Callable[[], bool]) -> None:
    """Kill an engine's processes when one of their workers dies; return at once.

    The kernel then kills the other workers (``lifeline``), and requests fail over. If the system
    refuses to watch the workers, only a warning is logged.

    Args:
        cores: Processes whose children are workers.
        is_stopping: Returns True once workers are expected to end.
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        return
    poll = select.poll()
    try:
        descriptors = _register_workers(cores, poll)
    except (OSError, psutil.Error) as error:  # e.g. an old kernel, seccomp, too many open files
        logger.warning(
            "Cannot watch vLLM's worker processes: %s. If one dies, its engine ends only after "
            "about nine seconds.",
            error,
        )
        return
    if descriptors is None:
        return

    def watch() -> None:
        with descriptors:
            while not is_stopping():
                if poll.poll(POLL_S * 1000):
                    if not is_stopping():
                        _kill(cores)
                    return

    threading.Thread(target=watch, name="vllm-worker-watch", daemon=True).start()


def _register_workers(cores: Sequence[psutil.Process], poll: select.poll) -> ExitStack | None:
    """Return the owner of the descriptors that ``poll`` watches; None without workers."""
    num_workers = 0
    with ExitStack() as opened:
        for worker in _workers_of(cores):
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(worker.pid)
                opened.callback(os.close, descriptor)
                poll.register(descriptor, select.POLLIN)
                num_workers += 1
        return opened.pop_all() if num_workers else None


def _workers_of(cores: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for core in cores:
        children: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            children = core.children()
        yield from filter(_is_worker, children)


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        command = " ".join(process.cmdline())
        return any(mark in command for mark in _WORKER_MARKS)
    return False


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
