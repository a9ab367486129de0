"""vLLM plugin that kills vLLM's processes when the replica that started them dies.

vLLM calls ``bind_to_parent`` in every process it starts (see ``pyproject.toml``). Keep this module
cheap to import: vLLM also loads it in processes that have nothing to do with Tandem, where it does
nothing.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PARENT_VARIABLE = "TANDEM_ENGINE_PARENT"
"""Environment variable with the replica's process id; without it, nothing is bound."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def bind_to_parent() -> None:
    """Make the kernel kill this process when its parent dies.

    Each process is bound to its direct parent, so a whole process tree falls from the root. The
    kernel watches the parent's *thread* that forked, which must live as long as the child
    (``vllm.launcher`` ensures that).
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux") or not _is_bound():
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # the parent died before prctl
        os.kill(os.getpid(), signal.SIGKILL)


def _is_bound() -> bool:
    root = os.environ.get(PARENT_VARIABLE, "")
    return root.isdigit() and int(root) != os.getpid()
