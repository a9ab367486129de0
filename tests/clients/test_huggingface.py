"""huggingface_hub's InferenceClient beyond what every client does."""

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient

from tests.clients.conftest import (
    ANSWER,
    CITY_CHOICE,
    CITY_TOOL,
    MESSAGES,
    City,
    Server,
)

OPTIONS = {"messages": MESSAGES, "model": "smollm2", "max_tokens": 10, "temperature": 0}


@pytest.fixture(params=["", "/v1"])
def client(request: pytest.FixtureRequest, server: Server) -> InferenceClient:
    return InferenceClient(base_url=server.url + request.param, api_key=server.key)


def test_chat_whole_and_streamed(client: InferenceClient) -> None:
    answer = client.chat.completions.create(logprobs=True, top_logprobs=1, seed=1, **OPTIONS)
    assert answer.choices[0].message.content == ANSWER
    assert len(answer.choices[0].logprobs.content) == 8
    stream = client.chat_completion(stream=True, stream_options={"include_usage": True}, **OPTIONS)
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert last.usage.completion_tokens == 8


def test_structured_output(server: Server) -> None:
    client = InferenceClient(base_url=server.url, api_key=server.key)
    schema = {"name": "city", "schema": City.model_json_schema(), "strict": True}
    # The client turns this into the format of TGI.
    answer = client.chat_completion(
        response_format={"type": "json_schema", "json_schema": schema},
        **{**OPTIONS, "max_tokens": 40},
    )
    parsed = City.model_validate_json(answer.choices[0].message.content)
    assert parsed.name == "Paris"


def test_a_tool_is_called(server: Server) -> None:
    client = InferenceClient(base_url=server.url, api_key=server.key)
    answer = client.chat_completion(
        tools=[CITY_TOOL], tool_choice=CITY_CHOICE, **{**OPTIONS, "max_tokens": 64}
    )
    (call,) = answer.choices[0].message.tool_calls
    assert City.model_validate_json(call.function.arguments)


async def test_async_chat(server: Server) -> None:
    async with AsyncInferenceClient(base_url=server.url, api_key=server.key) as client:
        answer = await client.chat_completion(**OPTIONS)
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat_completion(stream=True, **OPTIONS)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(pieces) == ANSWER


def test_classification_and_features(server: Server) -> None:
    url = f"{server.url}/models/sentiment"
    labels = InferenceClient(model=url, api_key=server.key).text_classification("I loved it.")
    assert labels[0].label == "POSITIVE"
    features = InferenceClient(model=f"{url}/embed", api_key=server.key)
    assert features.feature_extraction("A text.").shape == (1, 384)


async def test_async_classification(server: Server) -> None:
    url = f"{server.url}/models/sentiment"
    async with AsyncInferenceClient(model=url, api_key=server.key) as client:
        assert (await client.text_classification("A mess."))[0].label == "NEGATIVE"
