"""Reader of the KV cache events that vLLM's engine process publishes over ZeroMQ.

The structs are the fields that Tandem uses of those in ``vllm.distributed.kv_events``. vLLM numbers
its batches; after a gap the tracker starts over.
"""

import asyncio
import logging
from typing import Any

import msgspec

from cluster.engines.prefix_cache import PrefixTracker

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""Pause after a failure."""
MAX_QUEUED_BATCHES = 10_000
"""Batches queued in the socket, one per engine step; vLLM drops further ones."""

_Hash = int | bytes


class BlockStored(msgspec.Struct, tag=True):
    """Blocks were filled."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    """Inputs of each block's hash other than tokens: adapter, images, cache salt."""
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks were evicted."""

    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The cache was emptied."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Event]


_decode = msgspec.msgpack.Decoder(_Batch).decode


class KvEventReader:
    """Applies the events of one engine to a tracker; the engine binds ``endpoint``."""

    def __init__(self, tracker: PrefixTracker, endpoint: str) -> None:
        self._tracker = tracker
        self._endpoint = endpoint
        self._next_number = 0
        self._knows_block_size = False

    async def run(self) -> None:
        """Read until cancelled; after a failure, start over."""
        logged = ""
        while True:
            try:
                await self._read()
            except Exception as error:
                if repr(error) != logged:  # not every second
                    logged = repr(error)
                    logger.exception(
                        "reading vLLM's KV events failed; forgetting the prefixes of this replica"
                    )
                self._tracker.clear()
            await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        import zmq
        import zmq.asyncio

        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.RCVHWM, MAX_QUEUED_BATCHES)
            socket.subscribe(b"")
            socket.connect(self._endpoint)
            while True:
                _, number, payload = await socket.recv_multipart()
                self.apply_batch(int.from_bytes(number), payload)

    def apply_batch(self, number: int, payload: bytes) -> None:
        """Apply one batch; ``number`` counts the engine's batches from 0."""
        if number != self._next_number:
            logger.warning(
                "KV events %d to %d of vLLM were lost; forgetting the prefixes of this replica",
                self._next_number,
                number - 1,
            )
            self._tracker.clear()
        self._next_number = number + 1
        try:
            events = _decode(payload).events
        except msgspec.DecodeError as error:
            logger.warning(
                "cannot decode vLLM's KV events (%s); forgetting the prefixes of this replica",
                error,
            )
            self._tracker.clear()
            return
        for event in events:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        if isinstance(event, AllBlocksCleared):
            self._tracker.clear()
        elif event.medium not in (None, "GPU") or event.group_idx:
            return  # offloaded blocks, or a further kind of attention
        elif isinstance(event, BlockRemoved):
            self._tracker.remove_blocks(event.block_hashes)
        else:
            self._store(event)

    def _store(self, event: BlockStored) -> None:
        if not self._knows_block_size:  # the engine may have chosen another one than configured
            self._knows_block_size = True
            self._tracker.block_size = event.block_size
        if event.block_size != self._tracker.block_size:
            return
        count = _count_plain_blocks(event)
        self._tracker.add_blocks(
            event.block_hashes[:count],
            event.parent_block_hash,
            event.token_ids[: count * event.block_size],
            event.lora_name or "",
        )


def _count_plain_blocks(event: BlockStored) -> int:
    """Return the number of leading blocks made from tokens and an adapter only."""
    for count, keys in enumerate(event.extra_keys or ()):
        if keys and keys != [event.lora_name]:  # an image or a cache salt
            return count
    return len(event.block_hashes)
