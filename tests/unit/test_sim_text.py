"""Text of the simulated engine: tokenizer, generated words, stream chunks and error responses."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.engines.sim import tokenizer, wire
from cluster.engines.sim.chunks import ChatChunks, ChunkWriter, CompletionChunks
from cluster.engines.sim.generation import Generation
from cluster.engines.sim.parse import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    parse_body,
)
from cluster.usage import UsageCounter

JSON = "application/json"


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < token < 2**31 for token in ids)


@given(st.text(), st.text())
@example("0\x1f", "\x80")  # white space to str's regular expressions, not to bytes'
def test_texts_with_a_common_start_have_common_first_ids(beginning: str, rest: str) -> None:
    whole = tokenizer.encode(f"{beginning}\n{rest}")
    part = tokenizer.encode(f"{beginning}\n")
    assert whole[: len(part)] == part


@given(st.integers(0, 2**63 - 1))
def test_any_id_can_be_decoded(token: int) -> None:
    tokenizer.decode([token])


def test_generated_words_are_one_token_each() -> None:
    text = tokenizer.decode(tokenizer.WORD_IDS)
    assert tokenizer.encode(text) == tokenizer.WORD_IDS


def test_special_tokens_in_text_are_encoded_as_plain_text() -> None:
    ids = tokenizer.encode_chat([("user", "<|im_end|>")], add_generation_prompt=True)
    assert ids.count(tokenizer.MESSAGE_END) == 1
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def generate(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    (sequence,) = Generation(
        [prompt], [count], (), usage=UsageCounter(), seed=seed, fails=False
    ).sequences
    return [sequence.sample() for _ in range(count)]


def test_generated_text_depends_on_the_tokens_before_it_and_the_seed() -> None:
    prompt = tokenizer.encode("Tell me a story")
    whole = generate(prompt, 20)
    assert generate([*prompt, *whole[:8]], 12) == whole[8:]
    assert generate(prompt, 20, seed=1) != whole
    assert generate([*prompt, 1], 20) != whole
    assert len(set(whole)) > 10


async def test_text_is_cut_at_stop_strings_which_are_never_shown_in_part() -> None:
    prompt = tokenizer.encode("Tell me a story")
    text = tokenizer.decode(generate(prompt, 12))
    stop = text[9:14]
    generation = Generation(
        [prompt], [12], (stop, "never"), usage=UsageCounter(), seed=0, fails=False
    )
    (sequence,) = generation.sequences
    while not sequence.request.stopped:
        sequence.sample()
    deltas = await anext(generation.batches())
    assert "".join(delta[1] for delta in deltas) == text[: text.index(stop)]
    assert [delta[2] for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert sequence.stop_reason == stop


async def test_withheld_text_is_sent_at_the_end() -> None:
    prompt = tokenizer.encode("Tell me a story")
    generation = Generation(
        [prompt], [6], ("nowhere to be found",), usage=UsageCounter(), seed=0, fails=False
    )
    (sequence,) = generation.sequences
    ids = [sequence.sample() for _ in range(6)]
    deltas = await anext(generation.batches())
    assert "".join(delta[1] for delta in deltas) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(ChatChunks, ChatBody(messages=[])), (CompletionChunks, CompletionBody(prompt="A"))],
)
def test_the_fast_encoding_of_a_chunk_equals_the_full_one(
    kind: type[ChunkWriter], body: ChatBody | CompletionBody
) -> None:
    (sequence,) = Generation([[1]], [5], (), usage=UsageCounter(), seed=0, fails=False).sequences
    writer = kind("id-1", 5, 'a "model"', body)
    chunk = json.loads(writer.token((sequence, " word", False)).removeprefix(b"data: "))
    choice = writer.choice(sequence, " word", last=False, ids=None, first=False)
    assert chunk["choices"] == [choice]
    assert chunk | {"choices": []} == {
        "id": "id-1",
        "object": kind.object,
        "created": 5,
        "model": 'a "model"',
        "choices": [],
    }


def test_error_events_are_json() -> None:
    assert json.loads(wire.error_event("x")[6:])["error"]["code"] == 500


def error_of(kind: type[BaseModel], raw: bytes, content_type: str = JSON) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(kind, raw, content_type)
    return caught.value


# Responses of vLLM 0.32 to the same bodies.
@pytest.mark.parametrize(
    ("kind", "raw", "param", "message"),
    [
        (
            ChatBody,
            b"",
            "body",
            "1 validation error:\n  {'type': 'missing', 'loc': 'body', 'msg': 'Field required', "
            "'input': 'None'}",
        ),
        (
            ChatBody,
            b'{"model": "m"}',
            "body.messages",
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field "
            "required', 'input': '<dict of 1 items>'}",
        ),
        (
            ChatBody,
            b'{"messages": [], "stop": [5]}',
            "body.stop",
            "2 validation errors:\n  {'type': 'string_type', 'loc': 'body.stop', 'msg': 'Input "
            "should be a valid string', 'input': '<list of 1 items>'}\n  {'type': 'string_type', "
            "'loc': 'body.stop.0', 'msg': 'Input should be a valid string', 'input': '5'}",
        ),
        (
            CompletionBody,
            b'{"prompt": "Hi", "max_tokens": 1.5}',
            "body.max_tokens",
            "1 validation error:\n  {'type': 'int_from_float', 'loc': 'body.max_tokens', 'msg': "
            "'Input should be a valid integer, got a number with a fractional part', "
            "'input': '1.5'}",
        ),
        (
            DetokenizeBody,
            b'{"model": "m"}',
            "body.tokens",
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.tokens', 'msg': 'Field "
            "required', 'input': '<dict of 1 items>'}",
        ),
    ],
)
def test_error_responses_equal_those_of_vllm(
    kind: type[BaseModel], raw: bytes, param: str, message: str
) -> None:
    found = error_of(kind, raw)
    assert (found.status, found.type, found.param) == (400, "Bad Request", param)
    assert found.message == message


def test_a_body_that_is_not_json_is_rejected() -> None:
    found = error_of(ChatBody, b'{"model": ')
    assert (found.status, found.type, found.param) == (400, "BadRequestError", None)
    assert found.message.startswith("The request body is not valid JSON")


def test_a_completion_needs_a_prompt() -> None:
    found = error_of(CompletionBody, b'{"model": "m"}')
    assert found.type == "BadRequestError"
    assert found.message == (
        "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
    )


def test_only_json_is_accepted() -> None:
    found = error_of(ChatBody, b"{}", "text/plain")
    assert found.message == (
        "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    )
    assert found.param is None
