import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing.fingerprint import (
    EMPTY_FINGERPRINT,
    MAX_BODY_BYTES,
    MAX_ITEMS,
    PREFIX_ENDS,
    PROMPT_PATHS,
    Fingerprint,
    decode_body,
    fingerprint,
)

CHAT = "/v1/chat/completions"
SYSTEM = "You answer in one short sentence. " * 40


def of(path: str = CHAT, **body: Any) -> Fingerprint:
    return fingerprint(path, json.dumps({"model": "m", **body}).encode())


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def num_shared(one: Fingerprint, other: Fingerprint) -> int:
    pairs = zip(one.hashes, other.hashes, strict=False)
    return sum(a == b for a, b in pairs)


@given(st.text(max_size=3000), st.text(max_size=1000), st.text(max_size=1000))
def test_equal_prefixes_and_only_those_have_equal_hashes(start: str, one: str, other: str) -> None:
    a, b = (of("/v1/completions", prompt=start + end) for end in (one, other))
    data = [(start + end).encode() for end in (one, other)]
    for number, end in enumerate(a.ends[: len(b.ends)]):
        assert (a.hashes[number] == b.hashes[number]) == (data[0][:end] == data[1][:end])
    assert a.total_bytes == len(data[0])
    assert a.ends == tuple(end for end in PREFIX_ENDS if end <= len(data[0]))


def test_the_next_turn_of_a_conversation_keeps_its_hashes() -> None:
    first = [turn("system", SYSTEM), turn("user", "What is a link? " * 30)]
    more = [*first, turn("assistant", "A connection."), turn("user", "And a frame?")]
    one, other = of(messages=first), of(messages=more)
    assert len(one.hashes) > 10
    assert num_shared(one, other) == len(one.hashes)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "adapter"},
        {"cache_salt": "tenant"},
        {"messages": [turn("system", "X" + SYSTEM), turn("user", "Hi")]},
        {"messages": [turn("user", SYSTEM), turn("user", "Hi")]},
    ],
)
def test_a_change_at_the_start_changes_every_hash(change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"messages": [turn("system", SYSTEM), turn("user", "Hi")]}
    assert of(**asked).hashes
    assert num_shared(of(**asked), of(**asked | change)) == 0


def test_tools_come_after_the_system_prompt_and_before_the_turns() -> None:
    messages = [turn("system", SYSTEM), turn("user", SYSTEM)]
    without = of(messages=messages)
    tools = of(messages=messages, tools=[{"type": "function", "function": {"name": "f"}}])
    num_system = sum(end <= len(SYSTEM) for end in PREFIX_ENDS)
    assert num_shared(without, tools) == num_system < len(without.hashes)


def test_equal_text_has_equal_hashes_in_every_api_and_in_parts() -> None:
    system, user = SYSTEM, "Tell me more. " * 30
    chat = of(messages=[turn("system", system), turn("user", user)])
    parts = [{"type": "text", "text": user[:50]}, {"type": "text", "text": user[50:]}]
    for other in (
        of(messages=[turn("system", system), turn("user", parts)]),
        of("/v1/messages", system=system, messages=[turn("user", user)]),
        of("/v1/responses", instructions=system, input=user),
        of("/v1/responses", instructions=system, input=[turn("user", user)]),
    ):
        assert other.hashes == chat.hashes


def test_different_images_have_different_hashes_of_constant_size() -> None:
    def asked(url: str) -> Fingerprint:
        image = {"type": "image_url", "image_url": {"url": url}}
        return of(messages=[turn("user", [image, {"type": "text", "text": SYSTEM}])])

    one, other = asked("data:," + "a" * 100_000), asked("data:," + "b" * 100_000)
    assert num_shared(one, other) == 0
    assert one.total_bytes < len(SYSTEM) + 50


def test_the_text_of_a_request_with_a_large_image_is_read() -> None:
    url = "data:image/png;base64," + "A" * MAX_BODY_BYTES
    image = {"type": "image_url", "image_url": {"url": url}}
    source = {"type": "base64", "media_type": "image/png", "data": "A" * MAX_BODY_BYTES}
    text = {"type": "text", "text": SYSTEM}
    for found in (
        of(messages=[turn("user", [image, text])]),
        of("/v1/messages", messages=[turn("user", [{"type": "image", "source": source}, text])]),
    ):
        assert len(SYSTEM) < found.total_bytes < len(SYSTEM) + 50


@pytest.mark.parametrize(
    "text", ["base64 ", '";base64,", ', '"data": "a", ', '"source": {} ', ';base64,AAAA"', "data"]
)
def test_a_large_text_is_not_read(text: str) -> None:
    number = 2 * MAX_BODY_BYTES // len(text)
    for messages in ([turn("user", text * number)], [turn("user", text)] * number):
        assert of(messages=messages) == EMPTY_FINGERPRINT


def test_a_large_image_does_not_let_a_large_text_be_read() -> None:
    url = "data:image/png;base64," + "A" * MAX_BODY_BYTES
    text = {"type": "text", "text": "a" * MAX_BODY_BYTES}
    for image in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "source": {"type": "base64", "data": url}},  # counted once
    ):
        assert of(messages=[turn("user", [image, text])]) == EMPTY_FINGERPRINT


def test_a_prompt_of_token_ids_is_hashed() -> None:
    one = of("/v1/completions", prompt=list(range(100)))
    assert one.is_tokens
    assert one.total_bytes == 400
    assert of("/v1/completions", prompt=[list(range(100)), [1]]).hashes == one.hashes
    assert num_shared(one, of("/v1/completions", prompt=[7, *range(1, 100)])) == 0


def test_only_the_first_of_several_prompts_is_hashed() -> None:
    alone = of("/v1/completions", prompt=SYSTEM)
    assert of("/v1/completions", prompt=[SYSTEM, "b"]).hashes == alone.hashes


def test_session_max_tokens_and_model_are_read() -> None:
    read = of(messages=[], user="u", max_tokens=7, max_completion_tokens=5)
    assert (read.session, read.max_tokens, read.model) == ("u", 5, "m")
    assert of("/v1/responses", input="a", max_output_tokens=3).max_tokens == 3
    assert of("/v1/responses", input=SYSTEM, previous_response_id="r").hashes == ()


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": 1}',
    b'{"prompt": [1, "a"]}',
    b'{"prompt": [-1]}',
    b'{"prompt": [99999999999999]}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": [[]], "messages": [{"content": [1]}], "input": [1]}',
    b'{"messages": ' + b"[" * 100_000,
    b'{"x": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("path", PROMPT_PATHS)
@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_malformed_body_has_no_hashes_and_raises_nothing(path: str, body: bytes) -> None:
    assert fingerprint(path, body).hashes == ()


@given(st.sampled_from(PROMPT_PATHS), st.binary(max_size=200))
def test_garbage_raises_nothing(path: str, body: bytes) -> None:
    fingerprint(path, body)


def test_unknown_paths_and_long_bodies_have_no_fingerprint() -> None:
    assert fingerprint("/tokenize", b'{"prompt": "a"}') == EMPTY_FINGERPRINT
    assert of(messages=[turn("user", "a" * MAX_BODY_BYTES)]) == EMPTY_FINGERPRINT
    assert len([end for end in PREFIX_ENDS if end <= 100_000]) <= 128


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 3}, (1, 1)),
        ("/v1/chat/completions", {"messages": [], "n": 16384}, (1, 16384)),
        ("/v1/chat/completions", {"messages": [], "n": "5"}, (1, 5)),  # vLLM accepts this
        ("/v1/chat/completions", {"messages": [], "n": 2.0, "best_of": 4}, (1, 4)),
        ("/v1/chat/completions", {"messages": [], "n": None}, (1, 1)),
        ("/v1/chat/completions", {"messages": [], "n": [1], "best_of": -1}, (1, 1)),
        ("/v1/chat/completions/batch", {"messages": [[{}, {}], [{}], [{}]], "n": 2}, (3, 6)),
        ("/v1/completions", {"prompt": "abc"}, (1, 1)),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, (2, 4)),
        ("/v1/completions", {"prompt": [1, 2, 3]}, (1, 1)),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, (2, 2)),
        ("/v1/completions", {"prompt": []}, (1, 1)),
        ("/v1/completions", {"prompt": ["a" * MAX_BODY_BYTES, "b"]}, (2, 2)),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 3}, (1, 1)),
        ("/v1/embeddings", {"input": ["a", "b", "c"]}, (3, 3)),
        ("/v1/embeddings", {"input": [1, 2, 3]}, (1, 1)),
        ("/rerank", {"query": "a", "documents": ["b"] * 9}, (9, 9)),
        ("/score", {"text_1": "a", "text_2": ["b"] * 9}, (9, 9)),
        ("/classify", {}, (1, 1)),
        ("/v1/completions", {"prompt_embeds": ["a", "b"], "n": 2}, (2, 4)),
        ("/v1/completions", {"prompt": None, "prompt_embeds": ["a", "b"]}, (2, 2)),
        ("/v1/completions", {"prompt": ["c"], "prompt_embeds": ["a", "b"]}, (3, 3)),
        ("/v1/completions", {"prompt": "c", "prompt_embeds": "a"}, (2, 2)),
        ("/v1/completions", {"prompt": "c", "prompt_embeds": None}, (1, 1)),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"n": 5}}, (1, 5)),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": None}, (1, 1)),
        ("/inference/v1/generate", {"token_ids": [1, 2]}, (1, 1)),
    ],
)
def test_every_prompt_and_sequence_is_counted(path: str, body: Any, expected: Any) -> None:
    assert decode_body(path, json.dumps(body).encode()).fan_out == expected


@pytest.mark.parametrize(
    ("path", "field", "item", "expected"),
    [
        ("/v1/embeddings", "input", "1", 1),
        ("/v1/embeddings", "input", " 1", 1),
        ("/v1/completions", "prompt", "1", 1),
        ("/v1/embeddings", "input", '""', MAX_ITEMS),
        ("/v1/embeddings", "input", "[]", MAX_ITEMS),
        ("/rerank", "documents", "{}", MAX_ITEMS),
    ],
)
def test_counting_the_items_of_a_huge_list_needs_little_memory(
    path: str, field: str, item: str, expected: int
) -> None:
    body = f'{{"{field}": [{",".join([item] * 2_000_000)}]}}'.encode()
    decoded = decode_body(path, body)
    assert decoded.fan_out.prompts == expected  # also builds the decoder
    tracemalloc.start()
    try:
        assert decode_body(path, body).fan_out.prompts == expected
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_blanks_before_the_first_item_do_not_change_the_count() -> None:
    for blanks in (" ", "\n\t ", " " * 10_000):
        for items, expected in (("1,2,3", 1), ('"a","b"', 2), ("", 1)):
            body = f'{{"input": [{blanks}{items}]}}'.encode()
            assert decode_body("/v1/embeddings", body).fan_out.prompts == expected


def test_the_nested_fields_of_generate_are_read() -> None:
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 7, "n": "x"}}
    decoded = decode_body("/inference/v1/generate", json.dumps(body).encode())
    assert decoded.completion_limit == 7
    assert decoded.fingerprint() == Fingerprint(total_bytes=12, is_tokens=True)
