"""Ties the life of vLLM's processes to the replica that started them.

vLLM loads ``bind_to_parent`` as a plugin (see ``pyproject.toml``) in every process it starts.
Owns no state. Must stay cheap to import: it also loads in processes that have nothing to do
with Tandem, where it does nothing.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PARENT_VARIABLE = "TANDEM_ENGINE_PARENT"
"""Environment variable with the replica's process id; only where it is set is anything bound."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def bind_to_parent() -> None:
    """End this process, by the kernel's hand, as soon as the process that spawned it is gone.

    It binds each process to its direct parent, so a whole tree of them falls from the root. The
    kernel watches the parent's *thread* that forked: that thread must live as long as the child
    (``VllmEngine`` keeps one for this).
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux") or not _is_bound():
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it went before the kernel was told to watch it
        os.kill(os.getpid(), signal.SIGKILL)


def _is_bound() -> bool:
    root = os.environ.get(PARENT_VARIABLE, "")
    return root.isdigit() and int(root) != os.getpid()
