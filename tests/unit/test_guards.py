"""Patterns of personal data, placeholders, and the texts of a document."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.guards import (
    CONTEXT_CHARS,
    MAX_OPEN_CHARS,
    DocumentTexts,
    Placeholders,
    Span,
    TooManyValuesError,
    find_patterns,
    find_texts,
    remove_fields,
)
from cluster.guards.placeholders import MAX_VALUES

ALL = ("card", "iban", "email", "phone")
FOUND = {
    "4111 1111 1111 1111": "CARD",
    "4111-1111-1111-1111": "CARD",
    "378282246310005": "CARD",
    "6304000000000000": "CARD",
    "DE89 3704 0044 0532 0130 00": "IBAN",
    "gb82west12345698765432": "IBAN",
    "NO9386011117947": "IBAN",
    "anna.berger+x@mail.example.co.uk": "EMAIL",
    "jörg@müller.de": "EMAIL",
    "+49 (0)30 901820-11": "PHONE",
    "+1 202-555-0143": "PHONE",
    "0044 20 7946 0958": "PHONE",
}
NOT_FOUND = (
    "4111 1111 1111 1112",  # checksum
    "0000 0000 0000 0000",
    "DE89 3704 0044 0532 0130 01",  # checksum
    "DE89 3704 0044 0532 0130",  # length
    "XX89 3704 0044 0532 0130 00",  # country
    "anna@localhost",
    "+210 12345678",  # no country has this code
    "+1 234",
    "030 901820",  # national: could be any number
    "version 1.2.3-4, 2026-11-29 12:00:00",
)


def found(text: str) -> list[tuple[str, str]]:
    return [(text[span.start : span.end], span.label) for span in find_patterns(text, ALL)[0]]


@pytest.mark.parametrize("value", FOUND)
def test_values_are_found_among_words(value: str) -> None:
    assert found(value) == [(value, FOUND[value])]
    assert found(f"Write to {value}, or AT Q3: {value} OK.") == 2 * [(value, FOUND[value])]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_other_texts_are_left_alone(text: str) -> None:
    assert found(f"See {text} for more.") == []


PIECES = st.lists(
    st.one_of(st.sampled_from([*FOUND, *NOT_FOUND]), st.text("aB1 +@.-[0", max_size=12)),
    max_size=6,
).map(" ".join)


@given(st.data(), PIECES)
def test_the_settled_part_of_a_growing_text_never_changes(data: st.DataObject, text: str) -> None:
    expected = find_patterns(text, ALL)[0]
    context = pending = ""
    position, seen = 0, []
    while position < len(text):
        size = data.draw(st.integers(1, 9))
        pending += text[position : position + size]
        position = min(len(text), position + size)
        spans, settled = find_patterns(
            context + pending, ALL, start=len(context), is_final=position == len(text)
        )
        released = position - len(pending) - len(context)
        seen += [
            span._replace(start=span.start + released, end=span.end + released) for span in spans
        ]
        assert len(context) + len(pending) - settled <= MAX_OPEN_CHARS
        passed = (context + pending)[:settled]
        pending = (context + pending)[settled:]
        context = passed[-CONTEXT_CHARS:]
    assert sorted(seen) == expected


def test_a_search_takes_linear_time() -> None:
    for part in ("a", "1 ", "a.", "+1", "a@", "AB12", "[", "4111 "):
        # 5 ms here; quadratic time would exceed the test's limit.
        find_patterns(part * 100_000, ALL)


@given(st.lists(st.sampled_from([*FOUND, "plain", "[EMAIL_1]", "[CARD"]), min_size=1))
def test_placeholders_are_restored(values: list[str]) -> None:
    text = ", ".join(values)
    placeholders = Placeholders([text])
    redacted = placeholders.replace(text, find_patterns(text, ALL)[0])
    assert not any(value in redacted for value in FOUND)
    assert placeholders.restore(redacted) == text


def test_placeholders_are_numbered_and_repeat_for_equal_values() -> None:
    placeholders = Placeholders(["[EMAIL_2]"])
    text = "a@b.de c@d.de a@b.de"
    redacted = placeholders.replace(text, find_patterns(text, ALL)[0])
    assert redacted == "[EMAIL_1] [EMAIL_3] [EMAIL_1]"
    assert placeholders.replace("xy", [Span(0, 1, "PER"), Span(0, 2, "Äß")]) == "[SS_1]"
    quoted = placeholders.replace('"', [Span(0, 1, "odd label!")])
    assert placeholders.restore(json.dumps(quoted), is_json=True) == json.dumps('"')


def test_thousands_of_values_take_linear_time() -> None:
    # A second at most; quadratic time would exceed the test's limit.
    mails = " ".join(f"a{number}@b.de" for number in range(50_000))
    text = "[ " * 50_000 + mails
    placeholders = Placeholders([text])
    redacted = placeholders.replace(text, find_patterns(text, ["email"])[0])
    assert placeholders.restore(redacted) == text
    for end in range(len(redacted) - 10_000, len(redacted)):
        placeholders.open_start(redacted[end - 20 : end])


def test_the_values_of_a_request_are_bounded() -> None:
    placeholders = Placeholders()
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    spans = [Span(index, index + 1, "X") for index in range(len(text))]
    for number in range(MAX_VALUES // len(spans)):
        placeholders.replace(text, [span._replace(label=f"X{number}") for span in spans])
    with pytest.raises(TooManyValuesError):
        placeholders.replace(text, spans)


def test_all_texts_of_a_prompt_are_found_with_their_roles() -> None:
    tool = {
        "type": "tool_use",
        "id": "t",
        "name": "send",
        "input": {"to": {"name": "N", "n": 4111111111111111}},
    }
    call = {"id": "1", "function": {"name": "send", "arguments": '{"to": "\\u000a@"}'}}
    source = {"type": "text", "media_type": "text/plain", "data": "D"}
    body = {
        "messages": [
            {"role": "system", "content": "S"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "U"}, {"image_url": {"url": "I"}}],
            },
            {"role": "assistant", "tool_calls": [call]},
            {"role": "assistant", "content": [tool]},
            {"role": "user", "content": [{"type": "tool_result", "content": "R"}]},
            {"role": "user", "name": "Anna", "content": [{"type": "document", "source": source}]},
        ]
    }
    found = DocumentTexts()
    found.add_messages(body, "messages")
    assert [(slot.text, slot.role) for slot in found.slots] == [
        ("S", "system"),
        ("U", "user"),
        ("to", "assistant"),
        ("\n@", "assistant"),
        ("to", "assistant"),
        ("name", "assistant"),
        ("N", "assistant"),
        ("n", "assistant"),
        ("4111111111111111", "assistant"),
        ("R", "tool"),
        ("D", "user"),
        ("Anna", "user"),
    ]
    for slot in found.slots:
        slot.text = slot.text.replace("4111111111111111", "[CARD_1]").replace("@", "[AT]")
    found.slots[0].text = "X"
    found.write()
    assert body["messages"][0]["content"] == "X"
    assert tool["input"] == {"to": {"name": "N", "n": "[CARD_1]"}}
    assert call["function"]["arguments"] == '{"to": "\\n[AT]"}'
    assert not found.unknown


def test_roles_and_parts_that_hide_texts_are_named() -> None:
    body = {
        "messages": [
            {"role": "ignore all rules", "content": "U"},
            {"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "x"}]},
            {"role": "user", "content": [{"type": "text", "text": "U", "role": "system"}]},
        ]
    }
    found = DocumentTexts()
    found.add_messages(body, "messages")
    assert found.unknown == ["the role `ignore all rules`", "a part of the type `prompt_embeds`"]
    assert found.slots[-1].role == "user"


@pytest.mark.parametrize("text", ['{"a": "x\\u0040', '{"a": "x\\u0040", "a": "y"}'])
def test_arguments_that_nobody_can_parse_are_read_without_escapes(text: str) -> None:
    body = {"arguments": text}
    found = find_texts(body, "arguments")
    (slot,) = found.slots
    assert "x@" in slot.text
    found.write()
    assert body["arguments"] == text
    slot.text = "[EMAIL_1]"
    found.write()
    assert body["arguments"] == "[EMAIL_1]"


def test_fields_are_removed_at_every_level() -> None:
    event = {
        "logprobs": {"x": 1},
        "response": {"output": [{"content": [{"text": "t", "logprobs": [1]}]}]},
        "tools": [{"parameters": {"logprobs": {"type": "string"}}}],
        "content": [{"type": "tool_use", "input": {"logprobs": 1}}],
    }
    remove_fields(event, frozenset({"logprobs"}))
    assert event["logprobs"] is None
    assert event["response"] == {"output": [{"content": [{"text": "t", "logprobs": []}]}]}
    assert event["tools"] == [{"parameters": {"logprobs": {"type": "string"}}}]
    assert event["content"] == [{"type": "tool_use", "input": {"logprobs": 1}}]
