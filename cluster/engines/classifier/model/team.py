"""How the cores are shared by the threads that compute."""

import logging
import os

import torch

log = logging.getLogger(__name__)


def share_threads(num_threads: int, num_streams: int) -> list[int]:
    """The threads of each stream: all are shared out, as evenly as it goes."""
    each, more = divmod(num_threads, num_streams)
    return [each + (index < more) for index in range(num_streams)]


def pin_threads() -> None:
    """Put the calling thread on the first core, and the team that OpenMP gives it on the others.

    Linux now and then wakes two threads of a team on one core and takes tens of milliseconds to
    part them: one spins for the other, which waits for that core. To be called before the thread
    computes anything, and only where it will compute with all cores or alone: a team that grows
    has new threads, which inherit the first core. Does nothing with one core, or where a sandbox
    forbids it.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return
    torch.set_num_threads(len(cores))
    try:
        os.sched_setaffinity(0, cores[1:])
        torch.ones(len(cores) << 16).sum()  # makes the team, which inherits these cores
        os.sched_setaffinity(0, cores[:1])
    except OSError as error:
        log.warning("the threads that compute stay on all cores: %s", error)
