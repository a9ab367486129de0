"""Usage and prompts observed at ``generate`` are attributed to the right HTTP request."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.asgi import USAGE, Message, Receive, Scope, Send
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm.bursts import Arrivals
from cluster.engines.vllm.requests import (
    TrackRequest,
    count_aborted,
    count_prompts,
    count_usage,
    observe_prompts,
)
from cluster.routing import Fingerprint, fingerprint
from cluster.usage import UsageCounter


class FakeEngine:
    """Yields one token at a time, as vLLM does."""

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


async def count_tokens(
    generate: Any, prompts: list[list[int]], tokens: int, stop_after: int
) -> UsageCounter:
    async def one(prompt: list[int]) -> None:
        outputs = generate(prompt, tokens)
        async for output in outputs:
            if output.outputs[0].token_ids[0] + 1 == stop_after:
                break
        await outputs.aclose()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.gather(*map(one, prompts))  # as vLLM does for several prompts

    usage = UsageCounter()
    scope = {"type": "http", "path": "/v1/completions", "extensions": {USAGE: usage}}
    await TrackRequest(app, Arrivals())(scope, None, None)  # type: ignore[arg-type]
    return usage


async def test_usage_is_counted_per_request() -> None:
    engine = FakeEngine()
    generate = count_usage(engine.generate)
    first, second = await asyncio.gather(
        asyncio.create_task(count_tokens(generate, [[1, 2, 3]], tokens=5, stop_after=0)),
        asyncio.create_task(count_tokens(generate, [[1], [2, 2]], tokens=9, stop_after=2)),
    )
    assert first == UsageCounter(prompt_tokens=3, cached_tokens=1, completion_tokens=5)
    assert second == UsageCounter(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
    assert engine.closed == 3


async def test_prompts_of_pooling_requests_are_counted() -> None:
    async def encode(prompt: list[int]) -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=2, finished=True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in count_prompts(encode)([1, 2, 3]):
            pass

    usage = UsageCounter()
    scope = {"type": "http", "path": "/pooling", "extensions": {USAGE: usage}}
    await TrackRequest(app, Arrivals())(scope, None, None)  # type: ignore[arg-type]
    assert usage == UsageCounter(prompt_tokens=3, cached_tokens=2)


def sequence(num_tokens: int, kind: str = "FINAL_ONLY", *, is_prefilling: bool = False) -> Any:
    return SimpleNamespace(
        output_kind=SimpleNamespace(name=kind),
        is_prefilling=is_prefilling,
        prompt_len=7,
        num_cached_tokens=3,
        detokenizer=SimpleNamespace(num_output_tokens=lambda: num_tokens),
    )


@pytest.mark.parametrize(
    ("states", "aborted", "expected"),
    [
        ({"a": sequence(5)}, "a", UsageCounter(7, 3, 5)),
        ({"0_a": sequence(5), "1_a": sequence(6)}, "parent", UsageCounter(7, 3, 11)),
        ({"a": sequence(5, "DELTA")}, "a", UsageCounter()),  # `generate` has counted these
        ({"a": sequence(0, is_prefilling=True)}, "a", UsageCounter()),
        ({}, "a", UsageCounter()),
    ],
)
async def test_tokens_of_an_aborted_request_are_counted(
    states: dict[str, Any], aborted: str, expected: UsageCounter
) -> None:
    calls = []

    async def abort(request_id: str, internal: bool = False) -> None:
        states.clear()  # as vLLM does
        calls.append((request_id, internal))

    parents = {"parent": SimpleNamespace(child_requests={"0_a", "1_a"})}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await count_aborted(abort, states, parents)(aborted, internal=True)

    usage = UsageCounter()
    scope = {"type": "http", "path": "/v1/completions", "extensions": {USAGE: usage}}
    await TrackRequest(app, Arrivals())(scope, None, None)  # type: ignore[arg-type]
    assert usage == expected
    assert calls == [(aborted, True)]


async def test_token_times_are_the_engines() -> None:
    async def generate(prompt: list[int]) -> AsyncGenerator[Any, None]:
        times = SimpleNamespace(
            num_generation_tokens=5,
            first_token_latency=float(len(prompt)),
            first_token_ts=100.0,
            last_token_ts=102.0,
        )
        output = SimpleNamespace(token_ids=range(5))  # as vLLM does without a stream
        yield SimpleNamespace(
            prompt_token_ids=prompt, num_cached_tokens=0, outputs=[output], metrics=times
        )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for prompt in ([1, 2, 3], [1, 2]):
            async for _ in count_usage(generate)(prompt):
                pass

    counter = UsageCounter()
    scope = {"type": "http", "path": "/v1/completions", "extensions": {USAGE: counter}}
    await TrackRequest(app, Arrivals())(scope, None, None)  # type: ignore[arg-type]
    usage = counter.report()
    assert usage is not None
    assert (usage.completion_tokens, usage.ttft_s, usage.itl_s) == (10, 2.0, 0.5)


async def test_generate_works_outside_a_request() -> None:
    tokens = [output async for output in count_usage(FakeEngine().generate)([1], 3)]
    assert len(tokens) == 3


class RecordingTracker(PrefixTracker):
    """Records the prompts instead of tracking them."""

    def __init__(self) -> None:
        super().__init__(16, lambda ids: np.full(len(ids), 4))
        self.prompts: list[tuple[Fingerprint, list[int], str]] = []

    def add_prompt(self, text: Fingerprint, token_ids: Any, adapter: str = "") -> None:
        self.prompts.append((text, list(token_ids), adapter))


async def generate(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[int, None]:
    for token in range(3):
        yield token


async def test_the_first_prompt_of_each_request_is_recorded_with_its_fingerprint() -> None:
    tracker = RecordingTracker()
    observed = observe_prompts(generate, tracker)
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
            return [token async for token in observed(ids, None, "id", lora_request=lora)]

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
        await TrackRequest(app, Arrivals())(scope, receive, None)  # type: ignore[arg-type]

    await asyncio.gather(*(asyncio.create_task(ask(p)) for p in (["ab", "cd"], ["x" * 200])))
    assert sorted(ids for _, ids, _ in tracker.prompts) == [[97, 98], [120] * 200]
    for text, ids, adapter in tracker.prompts:
        prompts = ["ab", "cd"] if len(ids) == 2 else ["x" * 200]
        body = json.dumps({"prompt": prompts}).encode()
        assert text == fingerprint("/v1/completions", body)
        assert adapter == "l"


async def test_prompts_with_a_cache_salt_are_not_recorded() -> None:
    tracker = RecordingTracker()
    observed = observe_prompts(generate, tracker)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        prompt = {"prompt_token_ids": [1], "cache_salt": "s"}
        assert [token async for token in observed(prompt)] == [0, 1, 2]

    await TrackRequest(app, Arrivals())({"type": "http", "path": "/v1/completions"}, None, None)  # type: ignore[arg-type]
    assert tracker.prompts == []


async def test_prompts_outside_a_request_are_not_recorded() -> None:
    tracker = RecordingTracker()
    observed = observe_prompts(generate, tracker)
    assert [token async for token in observed({"prompt_token_ids": [1]})] == [0, 1, 2]
    assert tracker.prompts == []
