import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

from cluster.autoscaling.starts import REPORT_TIMEOUT_S, ReplicaStart, StartTracker
from cluster.engines.startup import (
    CLUSTER_START_S,
    START_NICENESS,
    STARTED_AT,
    StartupTimer,
    call_at_low_priority,
    gc_disabled,
    is_cluster_starting,
    modules_hidden,
    process_age_s,
)
from cluster.launch import ray_helper


def test_startup_phases_leave_no_gap() -> None:
    now = 100.0
    timer = StartupTimer(lambda: now)
    now = 103.0
    timer.mark("imports")
    now = 110.0
    timer.add_measured({"imports": 1.0, "model": 4.0})  # measured by the engine
    now = 112.0
    timer.mark("link")
    assert timer.phases_s == {"imports": 4.0, "model": 4.0, "link": 4.0}
    assert timer.total_s == 12.0


def test_a_process_knows_its_age() -> None:
    began = time.monotonic()
    code = "from cluster.engines.startup import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < time.monotonic() - began + 0.02
    assert process_age_s() > float(done.stdout)


def test_garbage_collection_is_disabled_and_survivors_are_frozen() -> None:
    gc.unfreeze()  # objects that earlier tests froze
    try:
        with gc_disabled():
            assert not gc.isenabled()
            kept = [[n] for n in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= len(kept)
        with pytest.raises(ZeroDivisionError), gc_disabled():
            raise ZeroDivisionError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


class Engine:
    """An object in a reference cycle, as models are."""

    def __init__(self) -> None:
        self.itself = self


def test_a_second_engine_does_not_freeze_garbage_of_the_first() -> None:
    gc.unfreeze()
    try:
        with gc_disabled():
            pass
        engine = Engine()
        left = weakref.ref(engine)
        with gc_disabled():
            del engine
        gc.collect()
        assert left() is None
    finally:
        gc.unfreeze()


def test_a_start_is_followed_from_the_decision_to_the_replica_that_answers() -> None:
    watch = StartTracker()
    old = ReplicaStart(10.0, 5.0)
    assert watch.follow(100.0, 1, 1, [old]) is None
    assert watch.follow(102.0, 2, 1, [old]) is None  # decided
    assert watch.follow(120.0, 2, 2, [old]) is None  # it answers, and has not reported yet
    phases = watch.follow(122.0, 2, 2, [old, ReplicaStart(103.5, 14.5)])
    assert phases == {"scheduling": 1.5, "start": 14.5, "notice": 2.0, "decision": 18.0}
    assert watch.follow(124.0, 2, 2, [old, ReplicaStart(103.5, 14.5)]) is None


def test_of_several_replicas_the_last_to_be_ready_counts() -> None:
    watch = StartTracker()
    watch.follow(0.0, 3, 1, [])
    phases = watch.follow(
        30.0, 3, 3, [ReplicaStart(1.0, 9.0), ReplicaStart(2.0, 27.0), ReplicaStart(-50.0, 9.0)]
    )
    assert phases == {"scheduling": 2.0, "start": 27.0, "notice": 1.0, "decision": 30.0}


def test_all_new_replicas_are_waited_for_before_one_is_the_last() -> None:
    watch = StartTracker()
    watch.follow(0.0, 3, 1, [])
    assert watch.follow(30.0, 3, 2, [ReplicaStart(1.0, 28.0)]) is None
    assert watch.follow(61.0, 3, 3, [ReplicaStart(1.0, 28.0)]) is None
    phases = watch.follow(62.0, 3, 3, [ReplicaStart(1.0, 28.0), ReplicaStart(2.0, 58.0)])
    assert phases == {"scheduling": 2.0, "start": 58.0, "notice": 1.0, "decision": 61.0}


def test_a_replica_that_is_replaced_is_no_rise_of_the_target() -> None:
    watch = StartTracker()
    watch.follow(0.0, 2, 2, [])
    assert watch.follow(100.0, 2, 1, []) is None
    assert watch.follow(112.0, 2, 2, [ReplicaStart(101.0, 9.0)]) is None


def test_a_start_that_is_called_off_or_never_reported_is_forgotten() -> None:
    watch = StartTracker()
    watch.follow(0.0, 2, 1, [])
    assert watch.follow(5.0, 1, 1, []) is None
    assert watch.follow(50.0, 1, 1, [ReplicaStart(49.0, 1.0)]) is None  # replaced after a death
    watch.follow(100.0, 2, 1, [])
    watch.follow(110.0, 2, 2, [])
    watch.follow(111.0 + REPORT_TIMEOUT_S, 2, 2, [])
    assert watch.follow(120.0 + REPORT_TIMEOUT_S, 2, 2, [ReplicaStart(101.0, 9.0)]) is None


def test_modules_are_hidden_only_meanwhile_and_only_if_they_are_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with modules_hidden("this", "gc"):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ImportError):
            importlib.import_module("this")
        assert importlib.import_module("gc") is gc
    assert "this" not in sys.modules
    assert importlib.util.find_spec("this") is not None
    with pytest.raises(ZeroDivisionError), modules_hidden("this"):
        raise ZeroDivisionError
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("started_at", "starting"),
    [
        ("1000", True),
        ("941", True),
        ("940", False),
        ("1001", False),
        ("?", False),
        (None, False),
    ],
)
def test_a_cluster_starts_for_a_minute(started_at: str | None, starting: bool) -> None:
    assert CLUSTER_START_S == 60.0
    environment = {} if started_at is None else {STARTED_AT: started_at}
    assert is_cluster_starting(environment, 1000.0) is starting


def niceness_of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_only_the_called_function_has_a_low_priority() -> None:
    before = niceness_of_this_thread()
    assert await call_at_low_priority(niceness_of_this_thread) == max(START_NICENESS, before)
    assert niceness_of_this_thread() == before


async def test_errors_of_a_function_at_low_priority_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await call_at_low_priority(lambda: 1 // 0)


def test_the_log_monitor_sleeps_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    ray_helper.lengthen_pauses("log_monitor.py")
    for pause_s in (0.1, 2.0):
        time.sleep(pause_s)
    assert slept == [ray_helper.LOG_PAUSE_S, 2.0]
