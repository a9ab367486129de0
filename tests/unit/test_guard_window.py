"""Texts of an answer between the engine and the client, split at any place."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import GuardConfig
from cluster.gateway.guards.answer_guards import AnswerBlockedError, AnswerGuards
from cluster.gateway.guards.checks import Check, Guard, PatternCheck
from cluster.gateway.guards.window import AnswerText
from cluster.gateway.messages import GuardOutcome, Request
from cluster.guards import MAX_OPEN_CHARS, Placeholders, Span, find_patterns
from cluster.guards.placeholders import MAX_PLACEHOLDER_CHARS
from cluster.metrics import Registry

PATTERNS = ("card", "iban", "email", "phone")
VALUES = ("4111 1111 1111 1111", "anna@example.com", "DE89 3704 0044 0532 0130 00", "+4930901820")
WORDS = st.lists(
    st.one_of(
        st.sampled_from([*VALUES, "[EMAIL_1]", "[EMAIL_", "[x]", "Xaver Huber"]),
        st.text("ab1 .\n[@+", max_size=20),
    ),
    max_size=12,
)
REQUEST = Request("r", "POST", "/", b"", [], b"")


class NameCheck:
    """Classifier of names: finds `Xaver` with the word behind it."""

    finds_parts = True

    async def find(self, texts: Sequence[str], _request: Request) -> list[list[Span]]:
        return [self._find(text) for text in texts]

    def _find(self, text: str) -> list[Span]:
        found = []
        start = text.find("Xaver")
        while start >= 0:
            end = start + len("Xaver")
            while end < len(text) and text[end] in " Huber":
                end += 1
            found.append(Span(start, len(text[:end].rstrip()), "PER"))
            start = text.find("Xaver", end)
        return found


def make_guards(
    action: str, placeholders: Placeholders | None = None, check: Check | None = None
) -> tuple[AnswerGuards, list[GuardOutcome]]:
    fields: dict[str, Any] = {"name": "g", "action": action, "window_chars": 40}
    fields |= {"patterns": PATTERNS} if check is None else {"classifier": "c"}
    config = GuardConfig.model_validate(fields)
    guard = Guard(config, check or PatternCheck(config), Registry())
    outcomes: list[GuardOutcome] = []
    guards = AnswerGuards(
        *([guard], placeholders or Placeholders(), REQUEST, "m"),
        note=lambda _guard, _stage, outcome: outcomes.append(outcome),
    )
    return guards, outcomes


def split(data: st.DataObject, text: str) -> list[str]:
    sizes = data.draw(st.lists(st.integers(1, 12), max_size=60))
    parts, position = [], 0
    for size in sizes:
        parts.append(text[position : position + size])
        position += size
    return [part for part in [*parts, text[position:]] if part]


async def pass_through(guards: AnswerGuards, parts: list[str], max_held: int) -> str:
    text = AnswerText(guards)
    passed = ""
    for part in parts:
        passed += await text.push(part)
        assert text.num_held <= max_held
    passed += await text.push("", is_final=True)
    await guards.finish()
    return passed


@given(st.data(), WORDS)
def test_no_match_leaves_a_stream_and_little_is_held_back(
    data: st.DataObject, words: list[str]
) -> None:
    text = " ".join(words)
    guards, outcomes = make_guards("redact")
    parts = split(data, text)
    passed = asyncio.run(pass_through(guards, parts, MAX_OPEN_CHARS))
    spans = find_patterns(text, PATTERNS)[0]
    assert passed == Placeholders().replace(text, spans)
    assert outcomes == (["redacted"] if spans else ["passed"])


@given(st.data(), WORDS)
def test_placeholders_are_restored_over_every_split(data: st.DataObject, words: list[str]) -> None:
    prompt = " ".join(words)
    placeholders = Placeholders([prompt])
    redacted = placeholders.replace(prompt, find_patterns(prompt, PATTERNS)[0])
    guards = AnswerGuards((), placeholders, REQUEST, "m", note=lambda *_: None)
    parts = split(data, redacted)
    assert asyncio.run(pass_through(guards, parts, MAX_PLACEHOLDER_CHARS)) == prompt


@given(st.data(), WORDS)
def test_a_blocked_answer_never_contains_the_match(data: st.DataObject, words: list[str]) -> None:
    text = " ".join(words)
    guards, _ = make_guards("block")
    spans = find_patterns(text, PATTERNS)[0]
    passed = [""]

    async def run() -> None:
        answer = AnswerText(guards)
        for part in split(data, text):
            passed[0] += await answer.push(part)
        passed[0] += await answer.push("", is_final=True)

    if not spans:
        asyncio.run(run())
        assert passed[0] == text
        return
    with pytest.raises(AnswerBlockedError):
        asyncio.run(run())
    assert len(passed[0]) <= spans[0].start
    assert text.startswith(passed[0])


@given(st.data(), WORDS)
def test_names_across_windows_are_redacted(data: st.DataObject, words: list[str]) -> None:
    text = " ".join(words)
    guards, _ = make_guards("redact", check=NameCheck())
    # A window, the part that exceeds it, and a name that is open at its end.
    passed = asyncio.run(pass_through(guards, split(data, text), 40 + len(text)))
    assert "Xaver" not in passed
    without = Placeholders().replace(text, NameCheck()._find(text))
    assert passed == without
