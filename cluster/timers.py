"""Precision of the kernel's timers."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30  # linux/prctl.h
_NS_PER_S = 10**9


@contextmanager
def late_timeouts(slack_s: float) -> Iterator[None]:
    """Let timeouts end late, by at most ``slack_s``, in this thread and in those that it starts.

    The threads keep it, this one does not. Outside Linux, this does nothing.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before_ns = prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(int(slack_s * _NS_PER_S)), 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(before_ns), 0, 0, 0)
