"""Shares of tenants in the request bodies that a router buffers."""

import pytest

from cluster.asgi import Message
from cluster.errors import OverloadedError
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
