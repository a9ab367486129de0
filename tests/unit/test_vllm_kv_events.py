"""vLLM's KV events, in their wire format, update the prefix tracker."""

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm import kv_events
from cluster.engines.vllm.kv_events import KvEventReader
from cluster.routing import Fingerprint

IDS = list(range(8))
TEXT = Fingerprint((1, 2), (16, 32), 32)


@pytest.fixture
def tracker() -> PrefixTracker:
    return PrefixTracker(16, lambda ids: np.full(len(ids), 4))


@pytest.fixture
def reader(tracker: PrefixTracker) -> KvEventReader:
    return KvEventReader(tracker, "inproc://unused")


def stored(blocks: list[Any], parent: Any, ids: list[int], **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": blocks,
        "parent_block_hash": parent,
        "token_ids": ids,
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
        **more,
    }


def removed(blocks: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": blocks, "medium": "GPU", **more}


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def test_stored_and_removed_blocks_change_the_cached_prefixes(
    tracker: PrefixTracker, reader: KvEventReader
) -> None:
    reader.apply_batch(
        0, batch(stored([b"a", b"b"], None, IDS))
    )  # the tracker adopts the block size
    tracker.add_prompt(TEXT, IDS)
    assert set(tracker.snapshot()) == {1, 2}
    reader.apply_batch(1, batch(removed([b"b"]), stored([7], b"a", IDS[4:])))
    assert set(tracker.snapshot()) == {1, 2}
    reader.apply_batch(2, batch(removed([7])))
    assert tracker.snapshot() == [1]
    reader.apply_batch(3, batch({"type": "AllBlocksCleared"}))
    assert tracker.snapshot() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"medium": "CPU"},
        {"group_idx": 1},
        {"block_size": 8},
        {"extra_keys": [["salt"], None]},
        {"extra_keys": [[["image", 0]], None]},
        {"lora_name": "l", "extra_keys": [["l"], ["l"]]},
    ],
)
def test_blocks_that_plain_prompts_cannot_share_are_ignored(
    fields: dict[str, Any], tracker: PrefixTracker, reader: KvEventReader
) -> None:
    reader.apply_batch(0, batch(stored([0], None, [9, 9, 9, 9])))
    tracker.add_prompt(TEXT, IDS)
    reader.apply_batch(1, batch(stored([1, 2], None, IDS, **fields)))
    assert tracker.snapshot() == []


def test_blocks_before_an_image_can_be_shared(
    tracker: PrefixTracker, reader: KvEventReader
) -> None:
    reader.apply_batch(0, batch(stored([1, 2], None, IDS, extra_keys=[None, [["image", 0]]])))
    tracker.add_prompt(TEXT, IDS)
    assert tracker.snapshot() == [1]


def test_blocks_of_an_adapter_serve_prompts_of_that_adapter(
    tracker: PrefixTracker, reader: KvEventReader
) -> None:
    adapter = {"lora_name": "l", "extra_keys": [["l"], ["l"]]}
    reader.apply_batch(0, batch(stored([1, 2], None, IDS, **adapter)))
    tracker.add_prompt(TEXT, IDS, "l")
    assert set(tracker.snapshot()) == {1, 2}


def test_removing_an_offloaded_copy_changes_nothing(
    tracker: PrefixTracker, reader: KvEventReader
) -> None:
    reader.apply_batch(0, batch(stored([1, 2], None, IDS)))
    tracker.add_prompt(TEXT, IDS)
    reader.apply_batch(1, batch(removed([2], medium="CPU"), removed([2], group_idx=1)))
    assert set(tracker.snapshot()) == {1, 2}


@pytest.mark.parametrize(("number", "payload"), [(2, batch()), (1, b"\xc1"), (1, b"\x93\x01\x02")])
def test_lost_and_undecodable_batches_clear_the_tracker(
    number: int, payload: bytes, tracker: PrefixTracker, reader: KvEventReader
) -> None:
    reader.apply_batch(0, batch(stored([1, 2], None, IDS)))
    tracker.add_prompt(TEXT, IDS)
    reader.apply_batch(number, payload)
    assert tracker.snapshot() == []
    reader.apply_batch(number + 1, batch(stored([1, 2], None, IDS)))
    tracker.add_prompt(TEXT, IDS)
    assert set(tracker.snapshot()) == {1, 2}


async def test_events_are_read_from_the_socket(tracker: PrefixTracker, tmp_path: Any) -> None:
    import zmq
    import zmq.asyncio

    endpoint = f"ipc://{tmp_path}/kv"
    reading = asyncio.create_task(KvEventReader(tracker, endpoint).run())
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.bind(endpoint)
        async with asyncio.timeout(60):
            assert await publisher.recv() == b"\x01"  # subscribed
            payload = batch(stored([1, 2], None, IDS))
            await publisher.send_multipart((b"", (0).to_bytes(8), payload))
            while tracker.block_size != 4:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        tracker.add_prompt(TEXT, IDS)
        assert set(tracker.snapshot()) == {1, 2}
        reading.cancel()
        await asyncio.wait([reading])


async def test_reading_starts_over_after_a_failure(
    tracker: PrefixTracker,
    reader: KvEventReader,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker.block_size = 4
    tracker.add_blocks([b"a"], None, IDS[:4])
    tracker.add_prompt(TEXT, IDS)
    assert tracker.snapshot()
    num_starts = 0
    restarted = asyncio.Event()

    async def read() -> None:
        nonlocal num_starts
        num_starts += 1
        if num_starts <= 3:
            raise RuntimeError("a bug")
        restarted.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(reader, "_read", read)
    monkeypatch.setattr(kv_events, "RETRY_S", 0.0)
    task = asyncio.create_task(reader.run())
    await asyncio.wait_for(restarted.wait(), 60)
    assert not tracker.snapshot(), "events were lost meanwhile"
    assert len(caplog.records) == 1, "the same failure is logged once"
    task.cancel()
    await asyncio.wait([task])
