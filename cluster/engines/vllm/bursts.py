"""A burst of requests to an idle engine begins with full steps.

vLLM's engine process starts a step with the first requests of a burst, and the others wait for it.
On CPUs, where a prompt of 128 tokens takes 0.1 s, the burst's prompts so take one step more than
they fill. Here, an idle engine waits while its replica prepares other requests (templates, tokens),
for some milliseconds at most. A lone request does not wait.
"""

import mmap
import queue
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

QUIET_S = 0.03
"""Time without another request after which the step of a burst starts. A replica that prepares 30
requests at a time sends the first ones to the engine after more than 10 ms."""
MAX_WAIT_S = 0.1


class Arrivals:
    """Number of the requests that a replica prepares, in memory that it shares with its forks."""

    def __init__(self) -> None:
        self._count = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    @property
    def num(self) -> int:
        return self._count[0]

    def begin(self) -> "Arrival":
        self._count[0] += 1
        return Arrival(self)

    def end(self) -> None:
        self._count[0] -= 1


class Arrival:
    """A request that is prepared for the engine."""

    __slots__ = ("_arrivals",)

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals: Arrivals | None = arrivals

    def end(self) -> None:
        """Note that the engine gets the request, or that it failed; may be called repeatedly."""
        if self._arrivals is not None:
            self._arrivals.end()
            self._arrivals = None


def gathering(
    process_input_queue: Callable[[Any], None], arrivals: Arrivals
) -> Callable[[Any], None]:
    """Wrap this method of ``EngineCoreProc`` to wait for requests that are being prepared."""

    @wraps(process_input_queue)
    def wrapper(core: Any) -> None:
        was_idle = not core.has_work()
        process_input_queue(core)
        if was_idle and arrivals.num:
            _gather(core)

    return wrapper


def _gather(core: Any) -> None:
    ends_s = time.monotonic() + MAX_WAIT_S
    while (left_s := ends_s - time.monotonic()) > 0:
        try:
            request = core.input_queue.get(timeout=min(left_s, QUIET_S))
        except queue.Empty:
            return
        core._handle_client_request(*request)
