"""langchain-openai and langchain-anthropic beyond what every client does."""

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.clients.conftest import ANSWER, QUESTION, City, Server

TURNS = [
    SystemMessage("Answer briefly."),
    HumanMessage(QUESTION),
    AIMessage(ANSWER),
    HumanMessage("Repeat your last answer."),
]


def openai_chat(server: Server, **options: object) -> ChatOpenAI:
    options = {"max_tokens": 10, "temperature": 0, **options}
    return ChatOpenAI(
        model="smollm2", base_url=server.openai_url, api_key=server.key, max_retries=0, **options
    )


def anthropic_chat(server: Server, **options: object) -> ChatAnthropic:
    options = {"max_tokens": 10, "model_kwargs": {"extra_body": {"temperature": 0}}, **options}
    return ChatAnthropic(
        model="smollm2", base_url=server.url, api_key=server.key, max_retries=0, **options
    )


@pytest.fixture(params=["chat", "responses", "messages"])
def chat(request: pytest.FixtureRequest, server: Server) -> BaseChatModel:
    if request.param == "messages":
        return anthropic_chat(server)
    return openai_chat(server, use_responses_api=request.param == "responses", stream_usage=True)


def test_whole_answers_and_conversations(chat: BaseChatModel) -> None:
    answer = chat.invoke(QUESTION)
    assert answer.text == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert "Paris" in chat.invoke(TURNS).text


def test_a_stream_has_the_answer_and_its_usage(chat: BaseChatModel) -> None:
    chunks = list(chat.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    usages = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    assert sum(usages) == 8


async def test_async_answers_streams_and_batches(chat: BaseChatModel) -> None:
    assert (await chat.ainvoke(QUESTION)).text == ANSWER
    assert "".join([chunk.text async for chunk in chat.astream(QUESTION)]) == ANSWER
    assert [answer.text for answer in await chat.abatch([QUESTION] * 3)] == [ANSWER] * 3


def test_a_prompt_over_the_context_is_recognized(chat: BaseChatModel) -> None:
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 3000)


def test_logprobs(server: Server) -> None:
    answer = openai_chat(server, logprobs=True, top_logprobs=2, max_tokens=2).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"]) == 2


def test_anthropic_counts_tokens(server: Server) -> None:
    chat = anthropic_chat(server, max_tokens=1)
    usage = chat.invoke(QUESTION).usage_metadata
    assert usage is not None
    assert chat.get_num_tokens_from_messages([HumanMessage(QUESTION)]) == usage["input_tokens"]


def test_structured_output_by_json_schema(server: Server) -> None:
    for chat in (openai_chat(server, max_tokens=40), anthropic_chat(server, max_tokens=40)):
        structured = chat.with_structured_output(City, method="json_schema")
        assert structured.invoke(QUESTION).name == "Paris"


def test_structured_output_by_a_tool(server: Server) -> None:
    for chat in (openai_chat(server, max_tokens=64), anthropic_chat(server, max_tokens=64)):
        structured = chat.with_structured_output(City, method="function_calling")
        assert isinstance(structured.invoke(QUESTION), City)


async def test_completions(server: Server) -> None:
    llm = OpenAI(model="smollm2", base_url=server.openai_url, api_key=server.key, max_tokens=4)
    assert llm.invoke("Once upon a time")
    assert "".join([piece async for piece in llm.astream("Once upon a time")])


async def test_embeddings(server: Server) -> None:
    # Without the check, the client counts tokens with OpenAI's tokenizers, which it downloads.
    embeddings = OpenAIEmbeddings(
        model="sentiment",
        base_url=server.openai_url,
        api_key=server.key,
        check_embedding_ctx_length=False,
    )
    first, second = embeddings.embed_documents(["A cat.", "A dog."])
    assert len(first) == len(second) == 384
    assert await embeddings.aembed_query("A cat.") == pytest.approx(first, abs=1e-3)
