"""``model: auto`` and fallbacks with a real classifier, through the vendors' clients."""

import asyncio
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.clients.conftest import ANSWER, MESSAGES, Server

BAD = "This is a terrible, boring, awful film. I hated it."
CAPACITY = 10
"""Requests of ``narrow`` until its queue is full."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key=server.key, max_retries=0) as made:
        yield made


def test_no_rule_holds_for_a_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="auto", messages=MESSAGES, max_tokens=10, temperature=0
    )
    assert answer.headers["x-tandem-model-choice"] == "smollm2; rule=default"
    parsed = answer.parse()
    assert (parsed.model, parsed.choices[0].message.content) == ("smollm2", ANSWER)


def test_the_classifiers_label_chooses_the_model(client: openai.OpenAI, server: Server) -> None:
    expected = "slow; rule=1; label=NEGATIVE "
    messages = [*MESSAGES, {"role": "user", "content": BAD}]
    stream = client.chat.completions.with_raw_response.create(
        model="auto", messages=messages, max_tokens=2, stream=True
    )
    assert stream.headers["x-tandem-model-choice"].startswith(expected)
    assert {chunk.model for chunk in stream.parse()} == {"slow"}
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as claude:
        message = claude.messages.with_raw_response.create(
            model="auto", messages=messages, max_tokens=2
        )
    assert message.headers["x-tandem-model-choice"].startswith(expected)
    assert message.parse().model == "slow"


def test_the_length_of_the_prompt_chooses_the_model(client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        model="auto", prompt="A wonderful day. " * 300, max_tokens=1
    )
    assert answer.headers["x-tandem-model-choice"].startswith("slow; rule=2")
    assert answer.parse().model == "slow"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_replicas_is_replaced_by_its_fallbacks(
    client: openai.OpenAI, stream: bool
) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="replaced", messages=MESSAGES, max_tokens=10, temperature=0, stream=stream
    )
    assert answer.headers["x-tandem-fallback"] == "replaced=503, asleep=503"
    found = list(answer.parse()) if stream else [answer.parse()]
    assert {each.model for each in found} == {"smollm2"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_a_guard_blocks_is_answered_by_the_fallback(
    server: Server, stream: bool
) -> None:
    with openai.OpenAI(
        base_url=server.openai_url, api_key=server.guarded_key, max_retries=0
    ) as client:
        ask = client.chat.completions.with_raw_response.create
        for text, model, fallback in (
            (BAD, "smollm2", "narrow=400"),
            ("What a wonderful film!", "narrow", None),
        ):
            messages = [{"role": "user", "content": text}]
            answer = ask(model="narrow", messages=messages, max_tokens=4, stream=stream)
            assert answer.headers.get("x-tandem-fallback") == fallback
            found = list(answer.parse()) if stream else [answer.parse()]
            assert {each.model for each in found} == {model}


async def test_a_request_over_a_full_queue_is_answered_by_the_fallback(server: Server) -> None:
    async with openai.AsyncOpenAI(
        base_url=server.openai_url, api_key=server.key, max_retries=0
    ) as client:
        ask = client.chat.completions.with_raw_response.create
        options = {"model": "narrow", "messages": MESSAGES, "temperature": 0, "max_tokens": 1000}
        # The answers of `narrow` take 100 s, so the first one is that of the request too many.
        tasks = [asyncio.create_task(ask(**options)) for _ in range(CAPACITY + 1)]
        try:
            # Requests that wait for 60 s (`queue_timeout_s`) may fall back, too.
            done, _ = await asyncio.wait(tasks, timeout=50, return_when=asyncio.FIRST_COMPLETED)
            assert done, "no request was passed on"
            answer = done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert answer.headers["x-tandem-fallback"] == "narrow=429"
    parsed = answer.parse()
    assert (parsed.model, parsed.choices[0].message.content) == ("smollm2", ANSWER)
