"""instructor and pydantic-ai beyond what every client does: structured output."""

import anthropic
import instructor
import openai
import pytest
from pydantic_ai import Agent, Embedder, NativeOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import MESSAGES, QUESTION, City, Server

OPTIONS = {
    "model": "smollm2",
    "messages": MESSAGES,
    "response_model": City,
    "max_tokens": 64,
    "temperature": 0,
    "max_retries": 0,
}
SETTINGS = {"max_tokens": 64, "temperature": 0}


def test_instructor_by_json_schema(server: Server) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=server.openai_url, api_key=server.key),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    assert client.create(**OPTIONS).name == "Paris"
    *_, last = client.create_partial(**OPTIONS)
    assert last.name == "Paris"


def test_instructor_by_a_tool(server: Server) -> None:
    chat = instructor.from_openai(
        openai.OpenAI(base_url=server.openai_url, api_key=server.key), mode=instructor.Mode.TOOLS
    )
    assert isinstance(chat.create(**OPTIONS), City)
    messages = instructor.from_anthropic(
        anthropic.Anthropic(base_url=server.url, api_key=server.key)
    )
    options = {**OPTIONS, "extra_body": {"temperature": 0}}
    del options["temperature"]  # the vendor's client has it no more
    assert isinstance(messages.create(**options), City)


async def test_async_instructor(server: Server) -> None:
    client = instructor.from_openai(
        openai.AsyncOpenAI(base_url=server.openai_url, api_key=server.key),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    assert (await client.create(**OPTIONS)).name == "Paris"


# AnthropicModel of this version fails with this version of anthropic ("Cannot instantiate Union").
@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest, server: Server) -> Model:
    provider = OpenAIProvider(base_url=server.openai_url, api_key=server.key)
    return request.param("smollm2", provider=provider)


async def test_pydantic_ai_answers_and_conversations(model: Model) -> None:
    agent = Agent(model, model_settings=SETTINGS)
    first = await agent.run(QUESTION)
    assert "Paris" in first.output
    assert first.usage.output_tokens > 0
    second = await agent.run("Repeat your last answer.", message_history=first.all_messages())
    assert "Paris" in second.output


async def test_pydantic_ai_streams(model: Model) -> None:
    for _ in range(5):  # if the machine is busy, vLLM merges tokens
        async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        assert "Paris" in "".join(pieces)
        if len(pieces) > 1:
            break
    assert len(pieces) > 1


async def test_pydantic_ai_native_output(server: Server) -> None:
    provider = OpenAIProvider(base_url=server.openai_url, api_key=server.key)
    agent = Agent(
        OpenAIChatModel("smollm2", provider=provider),
        output_type=NativeOutput(City),
        model_settings=SETTINGS,
    )
    assert (await agent.run(QUESTION)).output.name == "Paris"


async def test_pydantic_ai_output_by_a_tool(model: Model) -> None:
    settings = {**SETTINGS, "parallel_tool_calls": False}
    agent = Agent(model, output_type=City, model_settings=settings)
    assert isinstance((await agent.run(QUESTION)).output, City)


async def test_pydantic_ai_embeddings(server: Server) -> None:
    provider = OpenAIProvider(base_url=server.openai_url, api_key=server.key)
    embedder = Embedder(OpenAIEmbeddingModel("sentiment", provider=provider))
    answer = await embedder.embed_documents(["A cat.", "A dog."])
    assert [len(vector) for vector in answer.embeddings] == [384, 384]
