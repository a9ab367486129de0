"""A router's view of the running replicas survives bad replicas and a bad subscription."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.gateway import ReplicaInfo
from cluster.serve_internals import DeploymentID, DeploymentTargetInfo, LongPollNamespace
from deployments import discovery

POOL = DeploymentID("generator-m", "tandem")
KEY = (LongPollNamespace.DEPLOYMENT_TARGETS, POOL)


class FakeController:
    """Serve's controller; the test answers its open calls."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Any], None]] = []
        self.listen_for_change = SimpleNamespace(remote=self._listen)

    def _listen(self, _snapshot_ids: Any) -> Any:
        return SimpleNamespace(_on_completed=self.calls.append)

    async def called(self) -> None:
        """Wait for a call."""
        async with asyncio.timeout(60):
            while not self.calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def answer(self, answer: Any) -> None:
        """Answer the next call, from another thread as Ray does."""
        await self.called()
        call = self.calls.pop(0)
        await asyncio.gather(asyncio.to_thread(call, answer), return_exceptions=True)


def targets(*metadata: Any) -> Any:
    """Return an update with one replica for each metadata; their ids count from 0."""
    running = [
        SimpleNamespace(
            replica_id=SimpleNamespace(unique_id=str(i)), replica_metadata=each, node_id="node"
        )
        for i, each in enumerate(metadata)
    ]
    snapshot = DeploymentTargetInfo(is_available=True, running_replicas=running)
    return {KEY: SimpleNamespace(object_snapshot=snapshot, snapshot_id=1, notify_timestamp=0.0)}


GOOD = ReplicaInfo(id="", host="127.0.0.1", port=1).to_metadata()


@pytest.fixture
async def controller(monkeypatch: pytest.MonkeyPatch) -> FakeController:
    fake = FakeController()
    monkeypatch.setattr(discovery.ray, "get_actor", lambda *_, **__: fake)
    context = SimpleNamespace(get_actor_id=lambda: "router")
    monkeypatch.setattr(discovery.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(discovery, "SUPERVISE_S", 0.02)
    return fake


async def seen(updates: asyncio.Queue[list[str]]) -> list[str]:
    return await asyncio.wait_for(updates.get(), 60)


@pytest.fixture
async def updates(controller: FakeController) -> Any:
    """Ids of the replicas in each update that a router sees."""
    queue: asyncio.Queue[list[str]] = asyncio.Queue()
    found = discovery.Discovery({POOL: lambda infos: queue.put_nowait([i.id for i in infos])})
    yield queue
    found.check_health()
    await found.close()


@pytest.mark.parametrize("bad", [None, {}, {"host": 1, "port": "x"}, "text"])
async def test_a_replica_with_unreadable_metadata_does_not_hide_the_others(
    bad: Any, controller: FakeController, updates: asyncio.Queue[list[str]]
) -> None:
    await controller.answer(targets(GOOD, bad, GOOD))
    assert await seen(updates) == ["0", "2"]


@pytest.mark.parametrize("answer", [RuntimeError("the owner died"), None, {KEY: "text"}])
async def test_an_unexpected_answer_does_not_end_the_updates(
    answer: Any, controller: FakeController, updates: asyncio.Queue[list[str]]
) -> None:
    await controller.answer(answer)
    await controller.answer(targets(GOOD))
    assert await seen(updates) == ["0"]


async def test_a_silent_subscription_is_replaced(
    controller: FakeController,
    updates: asyncio.Queue[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await controller.answer(targets(GOOD))
    assert await seen(updates) == ["0"]
    await controller.called()
    controller.calls.clear()  # lost by the controller
    monkeypatch.setattr(discovery, "SILENT_S", 0.1)
    await controller.called()
    monkeypatch.setattr(discovery, "SILENT_S", 120.0)
    del controller.calls[:-1]  # while this test slept, it may have been replaced again
    await controller.answer(targets(GOOD, GOOD))
    assert await seen(updates) == ["0", "1"]
