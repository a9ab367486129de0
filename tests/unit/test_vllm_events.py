"""vLLM's KV events and prompts, in the shapes that it gives them, become what routers are told."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.asgi import Message, Receive, Scope, Send
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm_events import KvEvents
from cluster.engines.vllm_prompts import KeepBody, shown
from cluster.routing import Fingerprint, fingerprint

IDS = list(range(8))
TEXT = Fingerprint((1, 2), (16, 32), 32)


@pytest.fixture
def tracker() -> PrefixTracker:
    return PrefixTracker(16, lambda ids: np.full(len(ids), 4))


@pytest.fixture
def events(tracker: PrefixTracker) -> KvEvents:
    return KvEvents(tracker, "inproc://none")


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


def test_blocks_come_and_go(tracker: PrefixTracker, events: KvEvents) -> None:
    events.take(0, batch(stored([b"a", b"b"], None, IDS)))  # the size of blocks is learned too
    tracker.asked(TEXT, IDS)
    assert set(tracker.snapshot()) == {1, 2}
    events.take(1, batch(removed([b"b"]), stored([7], b"a", IDS[4:])))
    assert set(tracker.snapshot()) == {1, 2}
    events.take(2, batch(removed([7])))
    assert tracker.snapshot() == [1]
    events.take(3, batch({"type": "AllBlocksCleared"}))
    assert tracker.snapshot() == []


@pytest.mark.parametrize(
    "odd",
    [
        {"medium": "CPU"},
        {"group_idx": 1},
        {"block_size": 8},
        {"extra_keys": [["salt"], None]},
        {"extra_keys": [[["image", 0]], None]},
        {"lora_name": "l", "extra_keys": [["l"], ["l"]]},
    ],
)
def test_blocks_that_plain_prompts_cannot_share_are_passed_over(
    odd: dict[str, Any], tracker: PrefixTracker, events: KvEvents
) -> None:
    events.take(0, batch(stored([0], None, [9, 9, 9, 9])))
    tracker.asked(TEXT, IDS)
    events.take(1, batch(stored([1, 2], None, IDS, **odd)))
    assert tracker.snapshot() == []


def test_what_stands_before_an_image_can_be_shared(
    tracker: PrefixTracker, events: KvEvents
) -> None:
    events.take(0, batch(stored([1, 2], None, IDS, extra_keys=[None, [["image", 0]]])))
    tracker.asked(TEXT, IDS)
    assert tracker.snapshot() == [1]


def test_an_adapters_blocks_are_its_own(tracker: PrefixTracker, events: KvEvents) -> None:
    adapter = {"lora_name": "l", "extra_keys": [["l"], ["l"]]}
    events.take(0, batch(stored([1, 2], None, IDS, **adapter)))
    tracker.asked(TEXT, IDS, "l")
    assert set(tracker.snapshot()) == {1, 2}


def test_a_copy_in_other_memory_that_goes_changes_nothing(
    tracker: PrefixTracker, events: KvEvents
) -> None:
    events.take(0, batch(stored([1, 2], None, IDS)))
    tracker.asked(TEXT, IDS)
    events.take(1, batch(removed([2], medium="CPU"), removed([2], group_idx=1)))
    assert set(tracker.snapshot()) == {1, 2}


@pytest.mark.parametrize(("number", "payload"), [(2, batch()), (1, b"\xc1"), (1, b"\x93\x01\x02")])
def test_what_was_lost_or_is_not_understood_is_not_believed_any_more(
    number: int, payload: bytes, tracker: PrefixTracker, events: KvEvents
) -> None:
    events.take(0, batch(stored([1, 2], None, IDS)))
    tracker.asked(TEXT, IDS)
    events.take(number, payload)
    assert tracker.snapshot() == []
    events.take(number + 1, batch(stored([1, 2], None, IDS)))
    tracker.asked(TEXT, IDS)
    assert set(tracker.snapshot()) == {1, 2}


async def test_events_are_read_from_their_socket(tracker: PrefixTracker, tmp_path: Any) -> None:
    import zmq
    import zmq.asyncio

    endpoint = f"ipc://{tmp_path}/kv"
    reading = asyncio.create_task(KvEvents(tracker, endpoint).run())
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.bind(endpoint)
        async with asyncio.timeout(10):
            assert await publisher.recv() == b"\x01"  # subscribed
            payload = batch(stored([1, 2], None, IDS))
            await publisher.send_multipart((b"", (0).to_bytes(8), payload))
            while tracker.block_size != 4:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        tracker.asked(TEXT, IDS)
        assert set(tracker.snapshot()) == {1, 2}
        reading.cancel()
        await asyncio.wait([reading])


class Tracker(PrefixTracker):
    """Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__(16, lambda ids: np.full(len(ids), 4))
        self.seen: list[tuple[Fingerprint, list[int], str]] = []

    def asked(self, text: Fingerprint, token_ids: Any, adapter: str = "") -> None:
        self.seen.append((text, list(token_ids), adapter))


async def generate(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[int, None]:
    for token in range(3):
        yield token


async def test_each_first_prompt_is_shown_with_its_body() -> None:
    tracker = Tracker()
    show = shown(generate, tracker)
    lora = SimpleNamespace(lora_name="l")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        prompts = json.loads(body)["prompt"]

        async def one(prompt: str) -> list[int]:
            ids = {"prompt_token_ids": [ord(letter) for letter in prompt]}
            return [token async for token in show(ids, None, "id", lora_request=lora)]

        answers = await asyncio.gather(*map(one, prompts))  # as vLLM does for several prompts
        assert answers == [[0, 1, 2]] * len(prompts)

    async def ask(prompts: list[str]) -> None:
        body = json.dumps({"prompt": prompts}).encode()
        messages: list[Message] = [
            {"type": "http.request", "body": body[:9], "more_body": True},
            {"type": "http.request", "body": body[9:], "more_body": False},
        ]

        async def receive() -> Message:
            await asyncio.sleep(0)
            return messages.pop(0)

        scope: Scope = {"type": "http", "path": "/v1/completions"}
        await KeepBody(app)(scope, receive, None)  # type: ignore[arg-type]

    await asyncio.gather(*(asyncio.create_task(ask(p)) for p in (["ab", "cd"], ["x" * 200])))
    assert sorted(ids for _, ids, _ in tracker.seen) == [[97, 98], [120] * 200]
    for text, ids, adapter in tracker.seen:
        prompts = ["ab", "cd"] if len(ids) == 2 else ["x" * 200]
        body = json.dumps({"prompt": prompts}).encode()
        assert text == fingerprint("/v1/completions", body)
        assert adapter == "l"


async def test_a_salted_prompt_is_not_taken_for_the_plain_one() -> None:
    tracker = Tracker()
    show = shown(generate, tracker)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        prompt = {"prompt_token_ids": [1], "cache_salt": "s"}
        assert [token async for token in show(prompt)] == [0, 1, 2]

    await KeepBody(app)({"type": "http", "path": "/v1/completions"}, None, None)  # type: ignore[arg-type]
    assert tracker.seen == []


async def test_outside_of_a_request_nothing_is_shown() -> None:
    tracker = Tracker()
    show = shown(generate, tracker)
    assert [token async for token in show({"prompt_token_ids": [1]})] == [0, 1, 2]
    assert tracker.seen == []
