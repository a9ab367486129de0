"""OpenAI's client beyond what every client does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
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


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key=server.key, max_retries=0) as made:
        yield made


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.openai_url, api_key=server.key) as made:
        yield made


def test_models_are_listed(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert names == {"smollm2", "slow", "asleep", "replaced", "narrow", "sentiment", "reranker"}
    assert client.models.retrieve("smollm2").id == "smollm2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nix")


def test_a_stream_ends_with_its_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        max_tokens=10,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ANSWER
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


async def test_async_answers_and_streams(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=10, temperature=0
    )
    assert answer.choices[0].message.content == ANSWER
    async with async_client.chat.completions.stream(
        model="smollm2", messages=MESSAGES, max_tokens=10, temperature=0
    ) as stream:
        final = [event async for event in stream][-1]
    assert final.type == "content.done" or (await stream.get_final_completion()).choices


def test_several_choices_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_tokens=2, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert all(len(token.top_logprobs) >= 3 for token in choice.logprobs.content or [])


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model="smollm2", prompt="Once upon a time", max_tokens=6, temperature=1, seed=seed
        )
        return answer.choices[0].text

    assert sample(1) == sample(1) != sample(2)


def test_completions_of_several_prompts_with_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=["Once", "The sea"], max_tokens=2, logprobs=1, echo=True
    )
    assert answer.choices[0].text.startswith("Once")
    assert answer.choices[1].text.startswith("The sea")
    assert all(choice.logprobs and choice.logprobs.tokens for choice in answer.choices)


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="smollm2", messages=MESSAGES, max_tokens=40, temperature=0, response_format=City
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert parsed.name == "Paris"


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "tools": [CITY_TOOL], "max_tokens": 64, "temperature": 0}
    answer = client.chat.completions.create(messages=MESSAGES, tool_choice=CITY_CHOICE, **options)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert City.model_validate_json(call.function.arguments)
    stream = client.chat.completions.create(
        messages=MESSAGES, tool_choice=CITY_CHOICE, stream=True, **options
    )
    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "City"
    streamed = "".join(delta.function.arguments or "" for delta in deltas)
    assert City.model_validate_json(streamed)
    result = {"role": "tool", "tool_call_id": call.id, "content": "saved"}
    final = client.chat.completions.create(
        messages=[*MESSAGES, answer.choices[0].message, result], tool_choice="none", **options
    )
    assert final.choices[0].message.content


def test_a_tool_is_called_in_a_response(client: openai.OpenAI) -> None:
    function = CITY_TOOL["function"]
    answer = client.responses.create(
        model="smollm2",
        input=QUESTION,
        tools=[{"type": "function", **function}],
        tool_choice={"type": "function", "name": "City"},
        max_output_tokens=64,
        temperature=0,
    )
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert City.model_validate_json(call.arguments)


def test_a_conversation_of_several_turns(client: openai.OpenAI) -> None:
    turns = [
        {"role": "system", "content": "Answer briefly."},
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": "Repeat your last answer."},
    ]
    answer = client.chat.completions.create(
        model="smollm2", messages=turns, max_tokens=10, temperature=0
    )
    assert "Paris" in str(answer.choices[0].message.content)


def test_responses_whole_streamed_and_in_turns(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "max_output_tokens": 10, "temperature": 0}
    whole = client.responses.create(input=QUESTION, **options)
    assert whole.output_text == ANSWER
    assert whole.usage is not None
    assert whole.usage.output_tokens == 8
    with client.responses.stream(input=QUESTION, **options) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == ANSWER
    turns = [
        {"role": "user", "content": QUESTION},
        *whole.output,
        {"role": "user", "content": "Repeat your last answer."},
    ]
    assert "Paris" in client.responses.create(input=turns, **options).output_text


def test_input_tokens_of_a_response_are_counted(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="smollm2", input=QUESTION)
    answer = client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=1)
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_embeddings(client: openai.OpenAI, encoding_format: str) -> None:
    answer = client.embeddings.create(
        model="sentiment", input=["A cat.", "A dog."], encoding_format=encoding_format
    )
    assert len(answer.data) == 2
    assert answer.usage.prompt_tokens > 0
    if encoding_format == "float":
        assert {len(row.embedding) for row in answer.data} == {384}
        default = client.embeddings.create(model="sentiment", input="A cat.")  # base64, decoded
        assert default.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-3)


async def test_async_embeddings(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.embeddings.create(model="sentiment", input="A cat.", dimensions=8)
    assert len(answer.data[0].embedding) == 8


def batch_line(number: int, **body: object) -> bytes:
    fields = {"model": "sentiment", "input": f"Film number {number}.", **body}
    line = {"custom_id": f"f{number}", "method": "POST", "url": "/v1/embeddings", "body": fields}
    return json.dumps(line).encode()


def end_of(client: openai.OpenAI, file_id: str) -> openai.types.Batch:
    """Create a batch and return it when it has ended."""
    batch = client.batches.create(
        input_file_id=file_id,
        endpoint="/v1/embeddings",
        completion_window="24h",
        metadata={"owner": "tests"},
    )
    deadline = time.monotonic() + 90
    while batch.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def test_a_batch_of_a_file_has_results_and_errors(client: openai.OpenAI) -> None:
    content = b"\n".join([batch_line(1), batch_line(2), batch_line(3, input=[])])
    file = client.files.create(file=("films.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes) == ("films.jsonl", len(content))
    batch = end_of(client, file.id)
    assert batch.status == "completed"
    assert batch.metadata == {"owner": "tests"}
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    assert batch.usage is not None
    assert batch.usage.input_tokens > 0
    output = client.files.content(str(batch.output_file_id)).text.splitlines()
    answers = {answer["custom_id"]: answer for answer in map(json.loads, output)}
    assert answers.keys() == {"f1", "f2"}
    assert len(answers["f1"]["response"]["body"]["data"][0]["embedding"]) == 384
    (failed,) = client.files.content(str(batch.error_file_id)).text.splitlines()
    assert json.loads(failed)["response"]["status_code"] == 400
    assert batch.id in [each.id for each in client.batches.list(limit=10)]
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_batch_with_wrong_lines_fails_before_it_runs(client: openai.OpenAI) -> None:
    content = b"\n".join([batch_line(1), batch_line(1), batch_line(2, model="nix")])
    file = client.files.create(file=("films.jsonl", content), purpose="batch")
    batch = end_of(client, file.id)
    assert batch.status == "failed"
    assert batch.errors is not None
    found = [(error.code, error.line) for error in batch.errors.data or ()]
    assert found == [("duplicate_custom_id", 2), ("model_not_found", 3)]
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


async def test_async_files_and_cancelled_batches(
    server: Server, async_client: openai.AsyncOpenAI
) -> None:
    body = {"model": "slow", "prompt": "Hello", "max_tokens": 1000}  # 100 s
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    content = json.dumps(line).encode()
    file = await async_client.files.create(file=("slow.jsonl", content), purpose="batch")
    assert (await async_client.files.content(file.id)).content == content
    batch = await async_client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="1h"
    )
    batch = await async_client.batches.cancel(batch.id)
    async with asyncio.timeout(90):
        while batch.status != "cancelled":
            assert batch.status == "cancelling"
            await asyncio.sleep(0.2)
            batch = await async_client.batches.retrieve(batch.id)
    async with openai.AsyncOpenAI(
        base_url=server.openai_url, api_key=server.limited_key, max_retries=0
    ) as other:
        with pytest.raises(openai.NotFoundError):  # of another tenant
            await other.batches.retrieve(batch.id)


def test_a_closed_stream_ends_its_request(server: Server) -> None:
    with openai.OpenAI(
        base_url=server.openai_url, api_key=server.limited_key, max_retries=8
    ) as client:
        # 1,000 tokens take 100 s; the tenant may have one request at a time.
        options = {"model": "slow", "prompt": "Hello", "max_tokens": 1000}
        with client.completions.create(**options, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError):
                client.with_options(max_retries=0).completions.create(**options)
        start = time.monotonic()
        client.completions.create(**{**options, "max_tokens": 1})
        assert time.monotonic() - start < 50


def test_a_missing_replica_is_retried_after_the_given_time(server: Server) -> None:
    attempts: list[tuple[float, httpx.Response]] = []
    hooks = {"response": [lambda response: attempts.append((time.monotonic(), response))]}
    with (
        httpx.Client(event_hooks=hooks, timeout=60) as http,
        openai.OpenAI(
            base_url=server.openai_url, api_key=server.key, max_retries=1, http_client=http
        ) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.completions.create(model="asleep", prompt="Hello")
    (first_s, first), (second_s, second) = attempts
    assert first.status_code == second.status_code == 503
    assert second_s - first_s >= float(first.headers["retry-after"]) > 0
