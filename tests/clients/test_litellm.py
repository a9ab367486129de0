"""litellm's SDK, by provider, beyond what every client does."""

import litellm
import pytest

from tests.clients.conftest import (
    ANSWER,
    CITY_CHOICE,
    CITY_TOOL,
    MESSAGES,
    QUESTION,
    City,
    Server,
)

TURNS = [
    {"role": "system", "content": "Answer briefly."},
    *MESSAGES,
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "Repeat your last answer."},
]


@pytest.fixture(params=["openai", "anthropic", "hosted_vllm"])
def options(request: pytest.FixtureRequest, server: Server) -> dict[str, object]:
    return {
        "model": f"{request.param}/smollm2",
        "api_base": server.url if request.param == "anthropic" else server.openai_url,
        "api_key": server.key,
        "max_tokens": 10,
        "temperature": 0,
        "num_retries": 0,
    }


def read(chunks: list[litellm.ModelResponseStream]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_conversations_and_streams(options: dict[str, object]) -> None:
    answer = litellm.completion(messages=TURNS, **options)
    assert "Paris" in answer.choices[0].message.content
    stream = litellm.completion(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    assert read(chunks) == ANSWER
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == 8


async def test_async_answers_and_streams(options: dict[str, object]) -> None:
    answer = await litellm.acompletion(messages=MESSAGES, **options)
    assert answer.choices[0].message.content == ANSWER
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **options)
    assert read([chunk async for chunk in stream]) == ANSWER


def test_structured_output(server: Server) -> None:
    answer = litellm.completion(
        model="openai/smollm2",
        api_base=server.openai_url,
        api_key=server.key,
        messages=MESSAGES,
        max_tokens=40,
        temperature=0,
        response_format=City,
    )
    parsed = City.model_validate_json(answer.choices[0].message.content)
    assert parsed.name == "Paris"


def test_a_tool_is_called(options: dict[str, object]) -> None:
    answer = litellm.completion(
        messages=MESSAGES,
        tools=[CITY_TOOL],
        tool_choice=CITY_CHOICE,
        **{**options, "max_tokens": 64},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert City.model_validate_json(call.function.arguments)


def test_a_prompt_over_the_context_is_a_context_window_error(options: dict[str, object]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **options)


def test_responses_and_completions(server: Server) -> None:
    options = {"api_base": server.openai_url, "api_key": server.key, "temperature": 0}
    answer = litellm.responses(
        model="openai/smollm2", input=QUESTION, max_output_tokens=10, **options
    )
    assert answer.output_text == ANSWER
    completion = litellm.text_completion(
        model="text-completion-openai/smollm2", prompt="Once upon a time", max_tokens=4, **options
    )
    assert completion.choices[0].text


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "infinity"])
def test_embeddings(server: Server, provider: str) -> None:
    answer = litellm.embedding(
        model=f"{provider}/sentiment",
        api_base=server.openai_url,
        api_key=server.key,
        input=["A cat.", "A dog."],
    )
    assert [len(row["embedding"]) for row in answer.data] == [384, 384]
    assert answer.usage.prompt_tokens > 0


@pytest.mark.parametrize("provider", ["hosted_vllm", "infinity", "cohere"])
def test_rerank(server: Server, provider: str) -> None:
    documents = ["Berlin is the capital.", "Paris is the capital of France.", "France."]
    answer = litellm.rerank(
        model=f"{provider}/reranker",
        api_base=server.url,
        api_key=server.key,
        query=QUESTION,
        documents=documents,
        top_n=2,
        return_documents=provider != "infinity",  # it wants plain strings, Cohere objects
    )
    scores = [row["relevance_score"] for row in answer.results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
