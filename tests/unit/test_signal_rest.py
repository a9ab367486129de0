"""The main thread of an actor sleeps between Ray's checks for signals."""

import os
import signal
import sys
import threading
import time

import pytest

from cluster import ray_internals


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Install the rest; return the sleeps, which take no time."""
    monkeypatch.setattr(sys, "is_finalizing", sys.is_finalizing)
    found: list[float] = []
    ray_internals.signal_rest()()
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_the_main_thread_sleeps_in_each_check(sleeps: list[float]) -> None:
    assert [sys.is_finalizing() for _ in range(2)] == [False, False]
    assert sleeps == [ray_internals.SIGNAL_REST_S] * 2


def test_other_threads_do_not_sleep(sleeps: list[float]) -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(sys.is_finalizing()))
    thread.start()
    thread.join()
    assert (results, sleeps) == ([False], [])


def test_a_second_installation_changes_nothing(sleeps: list[float]) -> None:
    ray_internals.signal_rest()()
    sys.is_finalizing()
    assert len(sleeps) == 1


def test_a_signal_is_handled_during_the_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    def exit_on_signal(_signal: int, _frame: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(sys, "is_finalizing", sys.is_finalizing)
    monkeypatch.setattr(ray_internals, "SIGNAL_REST_S", 600.0)
    ray_internals.signal_rest()()
    before = signal.signal(signal.SIGUSR1, exit_on_signal)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))

    def check_before_signal() -> None:
        timer.start()  # not earlier: nothing else expects the exception
        sys.is_finalizing()

    try:
        with pytest.raises(SystemExit):
            check_before_signal()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
