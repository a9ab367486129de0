"""Reports of a replica for autoscaling: each has the result of a call for it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private import metrics_utils, replica, router

from cluster.serve_internals import record_for_reports_only, report_nothing_from_handles

INTERVAL_S = 0.01


async def test_each_report_follows_a_call_and_hardly_anything_else_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = ""
    reported = asyncio.Event()

    async def record(_: Any) -> None:
        nonlocal events
        events += "r"

    def push(_: Any) -> None:
        nonlocal events
        events += "p"
        if events.count("p") == 5:
            reported.set()

    cls = replica.ReplicaMetricsManager
    monkeypatch.setattr(cls, "start_metrics_pusher", cls.start_metrics_pusher)  # restores it
    monkeypatch.setattr(cls, "_push_autoscaling_metrics", push)
    monkeypatch.setattr(cls, "_add_autoscaling_metrics_point_async", record)
    for _ in range(2):  # the second one changes nothing
        record_for_reports_only()
    manager = cls.__new__(cls)
    manager._metrics_pusher = metrics_utils.MetricsPusher()
    manager._autoscaling_config = SimpleNamespace(
        metrics_interval_s=INTERVAL_S, look_back_period_s=5 * INTERVAL_S
    )
    manager.start_metrics_pusher()
    async with asyncio.timeout(10):
        await reported.wait()
    await manager._metrics_pusher.graceful_shutdown()
    assert "pp" not in events
    assert events[: events.rindex("p")].count("r") <= 6  # Serve's own task calls once


def test_a_handle_of_the_router_does_not_report(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = router.RouterMetricsManager
    monkeypatch.setattr(
        cls, "update_deployment_config", cls.update_deployment_config
    )  # restores it
    report_nothing_from_handles()
    manager = cls.__new__(cls)
    config = SimpleNamespace(autoscaling_config=object())
    manager.update_deployment_config(config, curr_num_replicas=1)  # without an event loop: no task
    assert manager.autoscaling_config is config.autoscaling_config
