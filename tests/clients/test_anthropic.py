"""Anthropic's client beyond what every client does."""

import time
from collections.abc import AsyncIterator, Iterator

import anthropic
import pytest

from tests.clients.conftest import ANSWER, MESSAGES, City, Server

OPTIONS = {"model": "smollm2", "max_tokens": 10, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key=server.key) as made:
        yield made


def test_a_message_has_its_usage_and_stop_reason(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(messages=MESSAGES, **OPTIONS)
    assert answer.type == "message"
    assert answer.role == "assistant"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == 8
    cut = client.messages.create(messages=MESSAGES, **{**OPTIONS, "max_tokens": 2})
    assert cut.stop_reason == "max_tokens"


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="smollm2", messages=MESSAGES)
    answer = client.messages.create(messages=MESSAGES, **{**OPTIONS, "max_tokens": 1})
    assert counted.input_tokens == answer.usage.input_tokens


def test_a_stream_has_anthropics_events(client: anthropic.Anthropic) -> None:
    with client.messages.stream(messages=MESSAGES, **OPTIONS) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"
    assert final.content[0].text == ANSWER
    assert final.usage.output_tokens == 8
    assert final.stop_reason == "end_turn"


async def test_async_messages_and_streams(async_client: anthropic.AsyncAnthropic) -> None:
    answer = await async_client.messages.create(messages=MESSAGES, **OPTIONS)
    assert answer.content[0].text == ANSWER
    async with async_client.messages.stream(messages=MESSAGES, **OPTIONS) as stream:
        assert "".join([text async for text in stream.text_stream]) == ANSWER


def test_a_conversation_with_a_system_prompt_and_blocks(client: anthropic.Anthropic) -> None:
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [{"type": "text", "text": "Repeat your last answer."}]},
    ]
    answer = client.messages.create(messages=turns, system="Answer briefly.", **OPTIONS)
    assert "Paris" in answer.content[0].text


def test_a_stop_sequence_ends_the_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(messages=MESSAGES, stop_sequences=[" France"], **OPTIONS)
    assert answer.content[0].text == "The capital of"
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == " France"


def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic) -> None:
    tool = {
        "name": "City",
        "description": "Save a city.",
        "input_schema": {**City.model_json_schema(), "additionalProperties": False},
    }
    options = {**OPTIONS, "tools": [tool], "max_tokens": 64}
    choice = {"type": "tool", "name": "City"}
    answer = client.messages.create(messages=MESSAGES, tool_choice=choice, **options)
    assert answer.stop_reason == "tool_use"
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert City.model_validate(call.input)
    with client.messages.stream(messages=MESSAGES, tool_choice=choice, **options) as stream:
        (streamed,) = [b for b in stream.get_final_message().content if b.type == "tool_use"]
    assert City.model_validate(streamed.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "saved"}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(messages=turns, tool_choice={"type": "none"}, **options).content


def test_models_are_listed(client: anthropic.Anthropic) -> None:
    assert "smollm2" in {model.id for model in client.models.list()}
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_a_closed_stream_ends_its_request(server: Server) -> None:
    # 1,000 tokens take 100 s; the tenant may have one request at a time.
    options = {"model": "slow", "messages": MESSAGES}
    with anthropic.Anthropic(
        base_url=server.url, api_key=server.limited_key, max_retries=8
    ) as client:
        with client.messages.stream(max_tokens=1000, **options) as stream:
            events = iter(stream)
            next(events)
            with pytest.raises(anthropic.RateLimitError):
                client.with_options(max_retries=0).messages.create(max_tokens=1, **options)
        start = time.monotonic()
        assert client.messages.create(max_tokens=1, **options).content
        assert time.monotonic() - start < 50
