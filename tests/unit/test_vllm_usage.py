"""Tokens are counted for the request that asked for them, and for no other."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from cluster.asgi import USAGE, Receive, Scope, Send
from cluster.engines.vllm_usage import CountUsage, counted
from cluster.usage import UsageCounter


class Engine:
    """Yields a token at a time, as vLLM does for a stream."""

    def __init__(self) -> None:
        self.closed = 0

    async def generate(self, prompt: list[int], tokens: int) -> AsyncGenerator[Any, None]:
        try:
            for token in range(tokens):
                await asyncio.sleep(0)
                completion = SimpleNamespace(token_ids=[token])
                yield SimpleNamespace(
                    prompt_token_ids=prompt, num_cached_tokens=1, outputs=[completion]
                )
        finally:
            self.closed += 1


async def ask(
    generate: Any, prompts: list[list[int]], tokens: int, leave_after: int
) -> UsageCounter:
    async def one(prompt: list[int]) -> None:
        outputs = generate(prompt, tokens)
        async for output in outputs:
            if output.outputs[0].token_ids[0] + 1 == leave_after:
                break
        await outputs.aclose()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.gather(*map(one, prompts))  # as vLLM does for several prompts

    usage = UsageCounter()
    scope = {"type": "http", "extensions": {USAGE: usage}}
    await CountUsage(app)(scope, None, None)  # type: ignore[arg-type]
    return usage


async def test_each_request_is_counted_alone() -> None:
    engine = Engine()
    generate = counted(engine.generate)
    first, second = await asyncio.gather(
        asyncio.create_task(ask(generate, [[1, 2, 3]], tokens=5, leave_after=0)),
        asyncio.create_task(ask(generate, [[1], [2, 2]], tokens=9, leave_after=2)),
    )
    assert first == UsageCounter(prompt_tokens=3, cached_tokens=1, completion_tokens=5)
    assert second == UsageCounter(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
    assert engine.closed == 3


async def test_outside_of_a_request_nothing_is_lost() -> None:
    tokens = [output async for output in counted(Engine().generate)([1], 3)]
    assert len(tokens) == 3
