"""One text of an answer between the engine and the client.

A text leaves once every guard that may change it has decided. Patterns hold back only what may
still become a match, classifiers a window. Values of the prompt replace their placeholders last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.errors import UnavailableError
from cluster.gateway.guards.answer_guards import AnswerGuards, check_slots
from cluster.gateway.guards.checks import Guard, run_sized
from cluster.guards import CONTEXT_CHARS, Span, before_spans, find_patterns, find_texts

MAX_JSON_CHARS = 1024 * 1024
"""Longest arguments of a tool that are held until they are complete."""


@dataclass(slots=True)
class _Judged:
    """The part of the held text that a classifier has judged."""

    end: int = 0
    before: str = ""
    """Text in front of it that the classifier gets as context."""
    spans: list[Span] = field(default_factory=list)


@dataclass(slots=True)
class _Searched:
    """The part of the held text in which a guard has looked for patterns."""

    end: int = 0
    spans: list[Span] = field(default_factory=list)


@dataclass(slots=True)
class _Reported:
    """The part of a text that a guard has yet to report on."""

    text: str = ""
    before: str = ""
    """Text in front of it that the classifier gets as context."""


class AnswerText:
    """One text of an answer; ``push`` its parts, and pass on what that returns."""

    def __init__(self, guards: AnswerGuards) -> None:
        self._guards = guards
        self._context = ""
        self._pending = ""
        self._restorable = ""
        self._searched = [(g, check, _Searched()) for g, check in guards.patterns]
        self._judged = [(g, _Judged()) for g in guards.classifiers if g.changes_text]
        self._reported = [(g, _Reported()) for g in guards.classifiers if not g.changes_text]

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._pending) + len(self._restorable)

    async def push(self, text: str, *, is_final: bool = False) -> str:
        """Add a part of the text; return the next part for the client.

        Raises:
            AnswerBlockedError: A guard ends the answer.
            UnavailableError: A check failed, and the guard is closed.
        """
        for guard, reported in self._reported:
            self._report(guard, reported, text, is_final=is_final)
        if not text and not (is_final and self.num_held):
            return ""
        self._pending += text
        spans, limit = await self._find_patterns(is_final)
        for guard, judged in self._judged:
            await self._judge(guard, judged, is_final)
            spans += judged.spans
            limit = min(limit, judged.end)
        return self._release(spans, before_spans(spans, limit), is_final)

    async def _find_patterns(self, is_final: bool) -> tuple[list[Span], int]:
        text, offset = self._context + self._pending, len(self._context)
        replaced: list[Span] = []
        limit = len(self._pending)
        for guard, check, searched in self._searched:
            start = offset + searched.end
            search = partial(find_patterns, text, check.patterns, start=start, is_final=is_final)
            spans, settled = await run_sized(len(text) - start, search)
            searched.end = settled - offset
            limit = min(limit, searched.end)
            if spans:
                self._guards.found(guard)
            if guard.changes_text:
                searched.spans += [_moved(span, -offset) for span in spans]
                replaced += searched.spans
        return replaced, limit

    async def _judge(self, guard: Guard, judged: _Judged, is_final: bool) -> None:
        num_new = len(self._pending) - judged.end
        if not num_new or (num_new < guard.config.window_chars and not is_final):
            return
        cut = len(self._pending) if is_final else _last_word(self._pending, judged.end)
        text = judged.before + self._pending[judged.end : cut]
        offset = judged.end - len(judged.before)
        found = [
            span._replace(start=max(span.start + offset, judged.end), end=span.end + offset)
            for span in (await self._guards.judge(guard, [text]))[0]
            if span.end + offset > judged.end
        ]
        if not is_final and guard.check.finds_parts:
            # A name may go on behind the cut; it is judged again, unless it fills the window.
            open_ = [span for span in found if span.end >= cut - 1 and span.start > judged.end]
            cut = min((span.start for span in open_), default=cut)
            found = [span for span in found if span.start < cut]
        if found:
            self._guards.found(guard)
        judged.before = (judged.before + self._pending[judged.end : cut])[
            -guard.config.window_chars // 2 :
        ]
        judged.end = cut
        judged.spans += found

    def _report(self, guard: Guard, reported: _Reported, text: str, *, is_final: bool) -> None:
        reported.text += text
        window = guard.config.window_chars
        if len(reported.text) < window and not (is_final and reported.text):
            return
        cut = len(reported.text) if is_final else _last_word(reported.text, 0)
        part = reported.before + reported.text[:cut]
        self._guards.judge_later(guard, [part])
        reported.before, reported.text = part[-(window // 2) :], reported.text[cut:]

    def _release(self, spans: Sequence[Span], limit: int, is_final: bool) -> str:
        text, self._pending = self._pending[:limit], self._pending[limit:]
        self._context = (self._context + text)[-CONTEXT_CHARS:]
        held: list[_Judged | _Searched] = [judged for _, judged in self._judged]
        for each in [*held, *(searched for *_, searched in self._searched)]:
            each.end -= limit
            each.spans = [_moved(span, -limit) for span in each.spans if span.start >= limit]
        placeholders = self._guards.placeholders
        inside = [span for span in spans if span.end <= limit]
        text = self._restorable + placeholders.replace(text, inside, restores=False)
        end = len(text) if is_final else placeholders.open_start(text)
        text, self._restorable = text[:end], text[end:]
        return placeholders.restore(text)


class JsonAnswerText:
    """One text of an answer that is JSON, such as the arguments of a tool.

    Values are escaped in it, so guards read it when it is complete; those that change texts hold it
    back until then.
    """

    def __init__(self, guards: AnswerGuards) -> None:
        self._guards = guards
        self._parts: list[str] = []
        self._num_chars = 0
        self._restorable = ""

    async def push(self, text: str, *, is_final: bool = False) -> str:
        """Add a part of the text; return the next part for the client; see ``AnswerText``."""
        if self._guards.guards and text:
            self._parts.append(text)
            self._num_chars += len(text)
            if self._num_chars > MAX_JSON_CHARS:
                raise UnavailableError(
                    f"The arguments of a tool exceed the {MAX_JSON_CHARS} characters that guards "
                    "can check."
                )
        passed = "" if self._guards.change_text else self._restore(text, is_final=is_final)
        if not is_final or not self._parts:
            return passed
        document = {"arguments": "".join(self._parts)}
        self._parts = []
        texts = find_texts(document, "arguments")
        if not self._guards.change_text:
            self._guards.check_later([slot.text for slot in texts.slots])
            return passed
        await check_slots(self._guards, texts)
        return document["arguments"]

    def _restore(self, text: str, *, is_final: bool) -> str:
        placeholders = self._guards.placeholders
        text = self._restorable + text
        end = len(text) if is_final else placeholders.open_start(text)
        text, self._restorable = text[:end], text[end:]
        return placeholders.restore(text, is_json=True)


def _moved(span: Span, offset: int) -> Span:
    return span._replace(start=span.start + offset, end=span.end + offset)


def _last_word(text: str, start: int) -> int:
    """Return the start of the last word, or the text's length if it has only one."""
    blank = max(text.rfind(blank, start) for blank in " \n")
    return blank + 1 if blank >= start else len(text)
