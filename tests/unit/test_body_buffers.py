"""Shares of tenants in the request bodies that a router buffers."""

import asyncio

import pytest

from cluster.asgi import Message
from cluster.errors import OverloadedError, RequestTimeoutError
from cluster.gateway.body import SMALL_BODY_BYTES, BodyBuffers

MIB = 1024**2


async def receive(buffers: BodyBuffers, num_bytes: int, tenant: str, *, declared: bool) -> bytes:
    async def chunk() -> Message:
        return {"type": "http.request", "body": bytes(num_bytes)}

    headers = [(b"content-length", b"%d" % num_bytes)] if declared else []
    return await buffers.receive(headers, chunk, tenant)


@pytest.mark.parametrize("declared", [True, False])
async def test_one_tenant_cannot_use_up_the_bytes_of_all(declared: bool) -> None:
    buffers = BodyBuffers(32 * MIB, 512 * MIB)
    refused = 0
    for _ in range(16):
        try:
            await receive(buffers, 32 * MIB, "greedy", declared=declared)
        except OverloadedError:
            refused += 1
    assert refused == 8
    for num_bytes in (13, 32 * MIB):
        await receive(buffers, num_bytes, "other", declared=declared)
    for _ in range(8):
        buffers.release(32 * MIB, "greedy")
    buffers.release(32 * MIB, "other")
    buffers.release(13, "other")
    assert buffers.used_bytes == 0


async def test_small_bodies_are_accepted_while_the_buffers_are_full() -> None:
    buffers = BodyBuffers(MIB, MIB)
    await receive(buffers, MIB, "", declared=True)
    await receive(buffers, SMALL_BODY_BYTES, "", declared=True)
    with pytest.raises(OverloadedError):
        await receive(buffers, SMALL_BODY_BYTES + 1, "", declared=True)


async def test_a_tenants_only_body_may_use_all_bytes() -> None:
    buffers = BodyBuffers(MIB, MIB)
    assert len(await receive(buffers, MIB, "a", declared=False)) == MIB


class Upload:
    """Body of which a chunk arrives every ``pause_s`` seconds."""

    def __init__(self, chunk_bytes: int, num_chunks: int, pause_s: float) -> None:
        self._chunk_bytes, self._num_left, self._pause_s = chunk_bytes, num_chunks, pause_s

    async def receive(self) -> Message:
        await asyncio.sleep(self._pause_s)
        self._num_left -= 1
        more = self._num_left > 0
        return {"type": "http.request", "body": bytes(self._chunk_bytes), "more_body": more}


async def test_a_body_that_arrives_too_slowly_is_refused() -> None:
    buffers = BodyBuffers(MIB, MIB, min_bytes_per_s=1000, grace_s=0.1)
    with pytest.raises(RequestTimeoutError, match="the minimum is 1000 bytes/s"):
        await buffers.receive([], Upload(1, 100, 0.01).receive, "a")
    assert buffers.used_bytes == 0
    # Faster than the minimum, although it takes longer than the grace time.
    assert len(await buffers.receive([], Upload(100_000, 10, 0.02).receive, "a")) == 1_000_000
    # Without a minimum.
    assert await BodyBuffers(MIB, MIB).receive([], Upload(1, 10, 0.02).receive, "a")
