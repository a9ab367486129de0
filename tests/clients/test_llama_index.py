"""llama-index's OpenAILike and OpenAILikeEmbedding beyond what every client does."""

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from tests.clients.conftest import ANSWER, CITY_CHOICE, QUESTION, City, Server

TURNS = [
    ChatMessage("Answer briefly.", role="system"),
    ChatMessage(QUESTION),
    ChatMessage(ANSWER, role="assistant"),
    ChatMessage("Repeat your last answer."),
]


def open_ai_like(server: Server, **options: object) -> OpenAILike:
    options = {"is_chat_model": True, "max_tokens": 10, "temperature": 0, **options}
    return OpenAILike(
        model="smollm2",
        api_base=server.openai_url,
        api_key=server.key,
        context_window=2048,
        max_retries=0,
        **options,
    )


@pytest.fixture
def embedding(server: Server) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(
        model_name="sentiment", api_base=server.openai_url, api_key=server.key, max_retries=0
    )


def test_conversations_and_streams(server: Server) -> None:
    llm = open_ai_like(server)
    assert "Paris" in str(llm.chat(TURNS).message.content)
    assert "".join(part.delta or "" for part in llm.stream_chat(TURNS[1:2])) == ANSWER
    assert "".join(part.delta or "" for part in llm.stream_complete(QUESTION)) == ANSWER


async def test_async_answers_and_streams(server: Server) -> None:
    llm = open_ai_like(server)
    assert (await llm.acomplete(QUESTION)).text == ANSWER
    stream = await llm.astream_chat(TURNS[1:2])
    assert "".join([part.delta or "" async for part in stream]) == ANSWER


def test_completions_without_a_chat_template(server: Server) -> None:
    assert open_ai_like(server, is_chat_model=False).complete("Once upon a time").text


def test_structured_prediction_by_json_schema(server: Server) -> None:
    llm = open_ai_like(server, max_tokens=40, should_use_structured_outputs=True)
    assert llm.structured_predict(City, PromptTemplate(QUESTION)).name == "Paris"


def test_structured_prediction_by_a_tool(server: Server) -> None:
    llm = open_ai_like(server, max_tokens=64, is_function_calling_model=True)
    found = llm.structured_predict(City, PromptTemplate(QUESTION), {"tool_choice": CITY_CHOICE})
    assert isinstance(found, City)


async def test_embeddings(embedding: OpenAILikeEmbedding) -> None:
    vectors = embedding.get_text_embedding_batch(["A cat.", "A dog."] * 8)
    assert len(vectors) == 16
    assert {len(vector) for vector in vectors} == {384}
    query = embedding.get_query_embedding("A cat.")
    assert query == pytest.approx(vectors[0], abs=1e-3)
    assert await embedding.aget_text_embedding("A cat.") == pytest.approx(query, abs=1e-3)
