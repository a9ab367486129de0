"""A burst of requests to an idle engine begins with full steps.

vLLM's engine process starts a step with the first requests of a burst, and the others wait for it.
On CPUs, where a prompt of 128 tokens takes 0.1 s, the burst's prompts so take one step more than
they fill. Here, an idle engine waits while requests that the replica has received are being
prepared (templates, tokens), for some milliseconds at most. A lone request does not wait.

The engine's process is a fork of the replica, so both see the number of these requests in shared
memory. In a process that was spawned it stays zero.
"""

import mmap
import queue
import time
from typing import Any

QUIET_S = 0.01
"""Time without another request after which the step starts."""
MAX_WAIT_S = 0.05

_memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forks
_counts = memoryview(_memory).cast("q")


class Arrival:
    """A request that is prepared for the engine."""

    __slots__ = ("_is_open",)

    def __init__(self) -> None:
        self._is_open = True
        _counts[0] += 1

    def end(self) -> None:
        """Note that the engine has the request, or that it failed; further calls have no effect."""
        if self._is_open:
            self._is_open = False
            _counts[0] -= 1


def num_arriving() -> int:
    return _counts[0]


def gather_bursts(core: Any) -> None:
    """Let vLLM's ``EngineCoreProc`` wait for requests that are being prepared."""
    process_input_queue = core._process_input_queue

    def gathering(self: Any) -> None:
        was_idle = not self.has_work()
        process_input_queue(self)
        if was_idle and num_arriving():
            _gather(self)

    core._process_input_queue = gathering


def _gather(core: Any) -> None:
    ends_s = time.monotonic() + MAX_WAIT_S
    while (left_s := ends_s - time.monotonic()) > 0:
        try:
            request = core.input_queue.get(timeout=min(left_s, QUIET_S))
        except queue.Empty:
            return
        core._handle_client_request(*request)
