"""Tells a prefix tracker what vLLM's engine process says of its KV blocks, over ZeroMQ.

vLLM numbers what it says, so what was lost is noticed: the tracker then begins anew. Does not
import vllm; the shapes are those of ``vllm.distributed.kv_events``.
"""

import logging
from typing import Any

import msgspec

from cluster.engines.prefix_cache import PrefixTracker

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Batches that wait here, one for each step of the engine; vLLM drops further ones."""

_Hash = int | bytes


class BlockStored(msgspec.Struct, tag=True):
    """Blocks were filled; ``extra_keys`` has what beside tokens each was made from."""

    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
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


class KvEvents:
    """Reads one engine's events from ``endpoint``, where the engine binds."""

    def __init__(self, tracker: PrefixTracker, endpoint: str) -> None:
        self._tracker = tracker
        self._endpoint = endpoint
        self._next = 0
        self._started = False

    async def run(self) -> None:
        """Read until cancelled."""
        import zmq
        import zmq.asyncio

        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.RCVHWM, MAX_WAITING)
            socket.subscribe(b"")
            socket.connect(self._endpoint)
            while True:
                _, number, payload = await socket.recv_multipart()
                self.take(int.from_bytes(number), payload)

    def take(self, number: int, payload: bytes) -> None:
        """One batch, the ``number``-th that the engine sent."""
        if number != self._next:
            logger.warning("vLLM's KV events %d to %d were lost", self._next, number - 1)
            self._tracker.cleared()
        self._next = number + 1
        try:
            events = _decode(payload).events
        except msgspec.DecodeError as error:
            logger.warning("vLLM's KV events are not understood: %s", error)
            self._tracker.cleared()
            return
        for event in events:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        if isinstance(event, AllBlocksCleared):
            self._tracker.cleared()
        elif event.medium not in (None, "GPU") or event.group_idx:
            return  # what was moved elsewhere, or belongs to further kinds of attention
        elif isinstance(event, BlockRemoved):
            self._tracker.removed(event.block_hashes)
        else:
            self._store(event)

    def _store(self, event: BlockStored) -> None:
        if not self._started:  # the engine's processes may have chosen another size
            self._started = True
            self._tracker.block_size = event.block_size
        if event.block_size != self._tracker.block_size:
            return
        count = _num_plain(event)
        self._tracker.stored(
            event.block_hashes[:count],
            event.parent_block_hash,
            event.token_ids[: count * event.block_size],
            event.lora_name or "",
        )


def _num_plain(event: BlockStored) -> int:
    """How many leading blocks were made from tokens and an adapter alone: no image, no salt."""
    for count, keys in enumerate(event.extra_keys or ()):
        if keys and keys != [event.lora_name]:
            return count
    return len(event.block_hashes)
