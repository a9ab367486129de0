"""Prefix events of a real vLLM match the cached tokens that it reports."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.link import LinkClient, LinkServer, PrefixEvents, RequestHead
from cluster.routing.fingerprint import PREFIX_ENDS, Fingerprint, fingerprint
from tests import asgi

CHAT = "/v1/chat/completions"
SYSTEM = "You are a careful assistant who answers in one short sentence. " * 12

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


def config(**fields: Any) -> GeneratorConfig:
    all_fields = {"name": "m", "model": "smollm2-135m-instruct", "max_model_len": 1024, **fields}
    return GeneratorConfig.model_validate(all_fields)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    # 48 MiB hold about 1000 tokens, so a few prompts evict each other.
    engine = make_generator_engine(config(kv_cache_memory_bytes=48 * 1024**2))
    await engine.start()
    yield engine
    await engine.stop()


def body(system: str, user: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"model": "m", "messages": messages, "max_tokens": 2, "temperature": 0}


def fingerprint_of(request_body: dict[str, Any]) -> Fingerprint:
    return fingerprint(CHAT, json.dumps(request_body).encode())


async def test_a_router_learns_which_prefixes_are_cached_and_evicted(engine: Engine) -> None:
    cached: set[int] = set()

    def apply(events: PrefixEvents) -> None:
        if events.cleared:
            cached.clear()
        cached.difference_update(events.removed)
        cached.update(events.stored)

    server = LinkServer(engine.app, b"secret", prefixes=engine.prefixes)
    link = LinkClient(*await server.start(), b"secret")
    link.on_prefixes = apply
    try:
        await link.connect()
        first = body(SYSTEM, "What is a link?")
        assert (await asgi.post(engine.app, CHAT, first)).status == 200
        hashes = fingerprint_of(first).hashes
        async with asyncio.timeout(60):
            while not set(hashes) <= cached:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        # Another question shares the system prompt, up to a block boundary.
        again = body(SYSTEM, "And what is a frame, please?")
        text = fingerprint_of(again)
        shared = sum(a == b for a, b in zip(hashes, text.hashes, strict=False))
        assert shared >= 5
        head = RequestHead(
            method="POST", path=CHAT, headers=[(b"content-type", b"application/json")]
        )
        async with link.open(head, json.dumps(again).encode()) as stream:
            while await stream.read():
                pass
        assert stream.usage is not None
        expected = PREFIX_ENDS[shared - 1] * stream.usage.prompt_tokens / text.total_bytes
        assert stream.usage.cached_tokens == pytest.approx(
            expected, abs=64
        )  # two blocks of 32 tokens

        for number in range(40):  # until the first prompt is evicted
            await asgi.post(engine.app, CHAT, body(f"{number} " + SYSTEM[::-1], "Hi"))
            if not set(hashes) & cached:
                break
        async with asyncio.timeout(60):
            while set(hashes) & cached:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await link.close()
        await server.stop()
