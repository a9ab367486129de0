"""Batches whose key, quota or model changes while their lines run or wait."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.batches import Batch, BatchStore, open_store
from cluster.key_file import KeyFile
from cluster.metrics import table
from tests.serve.gateway_kit import World, gateway_world
from tests.serve.test_batches import create, line, until, until_done, upload

KEY = {"sha256": hashlib.sha256(b"key").hexdigest(), "tenant": "acme"}
OTHER = {"sha256": hashlib.sha256(b"other").hexdigest(), "tenant": "other"}


class Keys:
    """A key file that a router reads."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "keys.json"
        self.source = KeyFile(self._path, expected=True)

    def write(self, *keys: dict[str, Any], **tenants: dict[str, Any]) -> None:
        self._path.write_text(json.dumps({"keys": keys, "tenants": tenants}))

    async def change(self, world: World, *keys: dict[str, Any], **tenants: Any) -> None:
        self.write(*keys, **tenants)
        await world.gateway.admission.refresh_keys()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return open_store(tmp_path / "store")


async def ended(world: World, store: BatchStore, id_: str) -> Batch:
    """Return a batch, whose key may be revoked, when it has ended."""

    def find() -> Batch:
        batch = store.find_batch(id_)
        assert batch is not None
        return batch

    await world.until(lambda: find().is_final)
    return find()


def error_statuses(store: BatchStore, batch: Batch) -> list[int]:
    with store.open(batch.error_id) as file:
        return [json.loads(each)["response"]["status_code"] for each in file]


@pytest.mark.parametrize(
    ("after", "status"),
    [
        pytest.param([], 401, id="the last key is revoked"),
        pytest.param([OTHER], 401, id="the tenant is removed"),
        pytest.param([{**KEY, "tenant": "other"}], 401, id="the key moves to another tenant"),
        pytest.param([{**KEY, "models": ["cls"]}], 403, id="the model is not allowed any more"),
    ],
)
async def test_lines_after_a_lost_right_fail(
    store: BatchStore, keys: Keys, after: list[dict[str, Any]], status: int
) -> None:
    keys.write(KEY)
    async with gateway_world(keys.source, batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        lines = [line(0, wait_before=True), line(1), line(2)]
        id_ = (await create(world, await upload(world, lines, "key"), "key")).json()["id"]
        await world.until(lambda: len(replica.bodies) == 1)
        await keys.change(world, *after)
        replica.gate.set()
        batch = await ended(world, store, id_)
        assert (batch.status, batch.completed, batch.failed) == ("completed", 1, 2)
        assert error_statuses(store, batch) == [status] * 2


async def test_lines_wait_for_a_spent_quota(
    store: BatchStore, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.runner.MAX_PAUSE_S", 0.05)
    keys.write(KEY, acme={"tokens_per_day": 10})
    async with gateway_world(keys.source, batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        lines = [line(number, prompt_tokens=20) for number in range(3)]
        id_ = (await create(world, await upload(world, lines, "key"), "key")).json()["id"]
        await until(world, id_, "in_progress", "key")
        await world.until(lambda: limit_hits(world) > 2)
        assert len(replica.bodies) < 3
        await keys.change(world, KEY, acme={"tokens_per_day": 10_000})
        batch = await ended(world, store, id_)
        assert (batch.completed, batch.failed) == (3, 0)


def limit_hits(world: World) -> float:
    """Return the refusals by the tenant's tokens per day."""
    return world.gateway.registry.counter(table.LIMITS_HIT, "acme", "tokens_per_day").value


async def test_lines_fail_if_their_model_is_removed(store: BatchStore) -> None:
    lines = [line(number, wait_before=number > 0) for number in range(3)]
    async with gateway_world(batch_store=store) as world:
        await world.add("gen", "gen-1")
        id_ = (await create(world, await upload(world, lines))).json()["id"]
        await until_done(world, id_, 1)
    async with gateway_world(batch_store=store, generator={"name": "new"}) as world:
        await world.add("new", "new-1")
        batch = await ended(world, store, id_)
        assert (batch.status, batch.completed, batch.failed) == ("completed", 1, 2)
        assert error_statuses(store, batch) == [404] * 2
