"""One text of an answer between the engine and the client.

A text leaves once every guard that may change it has decided. Patterns hold back only what may
still become a match, classifiers a window. Values of the prompt replace their placeholders last.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.gateway.guards.checks import Guard, PatternCheck, Stage
from cluster.gateway.messages import Outcome, Request
from cluster.guards import CONTEXT_CHARS, Placeholders, Span, before_spans, find_patterns

NoteOutcome = Callable[[Guard, Stage, Outcome], None]


class AnswerBlockedError(Exception):
    """A guard ends the answer."""

    def __init__(self, guard: str) -> None:
        super().__init__(f"The guard `{guard}` ended the answer.")
        self.guard = guard


class AnswerGuards:
    """The guards of one answer; its texts share them."""

    def __init__(
        self,
        guards: Sequence[Guard],
        placeholders: Placeholders,
        request: Request,
        model: str,
        note: NoteOutcome,
    ) -> None:
        self.patterns = [(g, g.check) for g in guards if isinstance(g.check, PatternCheck)]
        self.classifiers = [g for g in guards if not isinstance(g.check, PatternCheck)]
        self.placeholders = placeholders
        self.hides_tokens = any(guard.changes_text for guard in guards)
        """True if fields with the tokens of the answer must be removed."""
        self._guards = guards
        self._request = request
        self._model = model
        self._note = note
        self._outcomes: dict[str, Outcome] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def judge(self, guard: Guard, text: str) -> list[Span]:
        """Return what a classifier finds in a part of the answer.

        Raises:
            UnavailableError: The check failed, and the guard is closed.
        """
        if not text.strip():
            return []
        try:
            found = await guard.find([text], self._request, self._model, "answer")
        except Exception:
            self._outcomes[guard.name] = "refused" if guard.changes_text else "unchecked"
            raise
        if found is None:
            self._outcomes[guard.name] = "unchecked"
            return []
        return found[0]

    def judge_later(self, guard: Guard, text: str) -> None:
        """Have a guard that only reports judge a part of the answer, without waiting for it."""
        task = asyncio.create_task(self._report(guard, text))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self, guard: Guard, text: str) -> None:
        if await self.judge(guard, text):
            self._outcomes[guard.name] = "flagged"

    def found(self, guard: Guard) -> None:
        """Note that a guard found something.

        Raises:
            AnswerBlockedError: The guard ends the answer.
        """
        self._outcomes[guard.name] = guard.outcome
        if guard.config.action == "block":
            raise AnswerBlockedError(guard.name)

    async def finish(self) -> None:
        """Wait for the outstanding checks, and count the results; call it once."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        guards, self._guards = self._guards, ()
        for guard in guards:
            self._note(guard, "answer", self._outcomes.get(guard.name, "passed"))

    async def abandon(self) -> None:
        """Cancel the outstanding checks; the results so far count."""
        for task in self._tasks:
            task.cancel()
        await self.finish()


@dataclass(slots=True)
class _Judged:
    """The part of the held text that a classifier has judged."""

    end: int = 0
    before: str = ""
    """Text in front of it that the classifier gets as context."""
    spans: list[Span] = field(default_factory=list)


class AnswerText:
    """One text of an answer; ``push`` its parts, and pass on what that returns."""

    def __init__(self, guards: AnswerGuards, *, is_json: bool = False) -> None:
        self._guards = guards
        self._is_json = is_json
        self._context = ""
        self._pending = ""
        self._restorable = ""
        self._unreported = ""
        self._judged = [(g, _Judged()) for g in guards.classifiers if g.changes_text]
        self._reporting = [g for g in guards.classifiers if not g.changes_text]

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
        if not text and not (is_final and (self.num_held or self._unreported)):
            return ""
        self._report(text, is_final)
        self._pending += text
        spans, limit = self._find_patterns(is_final)
        for guard, judged in self._judged:
            await self._judge(guard, judged, is_final)
            spans += judged.spans
            limit = min(limit, judged.end)
        return self._release(spans, before_spans(spans, limit), is_final)

    def _find_patterns(self, is_final: bool) -> tuple[list[Span], int]:
        text, offset = self._context + self._pending, len(self._context)
        replaced: list[Span] = []
        limit = len(text)
        for guard, check in self._guards.patterns:
            spans, settled = find_patterns(text, check.patterns, start=offset, is_final=is_final)
            limit = min(limit, settled)
            if spans:
                self._guards.found(guard)
            if guard.changes_text:
                replaced += spans
        moved = [
            span._replace(start=span.start - offset, end=span.end - offset) for span in replaced
        ]
        return moved, limit - offset

    async def _judge(self, guard: Guard, judged: _Judged, is_final: bool) -> None:
        num_new = len(self._pending) - judged.end
        if not num_new or (num_new < guard.config.window_chars and not is_final):
            return
        cut = len(self._pending)
        if not is_final:
            blank = max(self._pending.rfind(blank, judged.end) for blank in " \n")
            cut = blank + 1 if blank >= judged.end else cut
        text = judged.before + self._pending[judged.end : cut]
        offset = judged.end - len(judged.before)
        found = [
            span._replace(start=max(span.start + offset, judged.end), end=span.end + offset)
            for span in await self._guards.judge(guard, text)
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

    def _report(self, text: str, is_final: bool) -> None:
        if not self._reporting:
            return
        self._unreported += text
        window = max(guard.config.window_chars for guard in self._reporting)
        if len(self._unreported) >= window or is_final:
            for guard in self._reporting:
                self._guards.judge_later(guard, self._unreported)
            self._unreported = ""

    def _release(self, spans: Sequence[Span], limit: int, is_final: bool) -> str:
        text, self._pending = self._pending[:limit], self._pending[limit:]
        self._context = (self._context + text)[-CONTEXT_CHARS:]
        for _, judged in self._judged:
            judged.end -= limit
            judged.spans = [
                span._replace(start=span.start - limit, end=span.end - limit)
                for span in judged.spans
                if span.start >= limit
            ]
        placeholders = self._guards.placeholders
        inside = [span for span in spans if span.end <= limit]
        text = self._restorable + placeholders.replace(text, inside, restores=False)
        end = len(text) if is_final else placeholders.open_start(text)
        text, self._restorable = text[:end], text[end:]
        return placeholders.restore(text, is_json=self._is_json)
