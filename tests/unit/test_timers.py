"""Timer slack of threads."""

import ctypes
import sys
import threading

import pytest

from cluster.timers import late_timeouts

PR_GET_TIMERSLACK = 30  # linux/prctl.h


def slack_ns() -> int:
    return int(ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_threads_started_inside_keep_the_slack_and_this_one_does_not() -> None:
    before = slack_ns()
    found: list[int] = []
    ends = threading.Event()

    def wait_and_read() -> None:
        ends.wait()
        found.append(slack_ns())

    thread = threading.Thread(target=wait_and_read)
    with late_timeouts(0.2):
        thread.start()
        inside = slack_ns()
    assert (inside, slack_ns()) == (200_000_000, before)
    ends.set()
    thread.join()
    assert found == [200_000_000]
