"""The guards of one answer: checks of its complete texts, and the results for records."""

import asyncio
from collections.abc import Callable, Sequence

from cluster.config.guards import GuardOutcome
from cluster.errors import GuardUnreadableError, RequestError, UnavailableError
from cluster.gateway.guards.checks import Guard, PatternCheck, Stage
from cluster.gateway.messages import Request
from cluster.guards import DocumentTexts, Placeholders, Span

NoteOutcome = Callable[[Guard, Stage, GuardOutcome], None]

MAX_REPORTS = 32
"""Most checks of one answer that nothing waits for; further parts stay unchecked."""


class AnswerBlockedError(Exception):
    """A guard ends the answer."""


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
        self.change_text = any(guard.changes_text for guard in guards)
        """True if a guard decides what the client gets; tokens of the answer must be removed."""
        self.guards = guards
        self._request = request
        self._model = model
        self._note = note
        self._outcomes: dict[str, GuardOutcome] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_finished = False

    async def check(self, texts: Sequence[str]) -> list[str | None]:
        """Return complete texts for the client; None instead of those that a guard blocks.

        Raises:
            UnavailableError: A check failed, and the guard is closed.
        """
        early = [guard for guard in self.guards if not _only_reports(guard)]
        for guard in self.guards:
            if guard not in early:
                self.judge_later(guard, texts)
        results = await asyncio.gather(
            *(self._find(guard, texts) for guard in early), return_exceptions=True
        )
        checked: list[str | None] = list(texts)
        spans: list[list[Span]] = [[] for _ in texts]
        for guard, found in zip(early, results, strict=True):
            if isinstance(found, BaseException):
                raise found
            for index, parts in enumerate(found):
                if not parts:
                    continue
                self._outcomes[guard.name] = guard.outcome
                if guard.config.action == "block":
                    checked[index] = None
                elif guard.changes_text:
                    spans[index] += parts
        replace, restore = self.placeholders.replace, self.placeholders.restore
        return [
            None if text is None else restore(replace(text, parts, restores=False))
            for text, parts in zip(checked, spans, strict=True)
        ]

    async def _find(self, guard: Guard, texts: Sequence[str]) -> list[list[Span]]:
        if isinstance(guard.check, PatternCheck):
            return await guard.check.find(texts, self._request)
        return await self.judge(guard, texts)

    async def judge(self, guard: Guard, texts: Sequence[str]) -> list[list[Span]]:
        """Return what a classifier finds in parts of the answer.

        Raises:
            UnavailableError: The check failed, and the guard is closed.
        """
        found: list[list[Span]] = [[] for _ in texts]
        places = [index for index, text in enumerate(texts) if text.strip()]
        if not places:
            return found
        parts = [texts[index] for index in places]
        try:
            results = await guard.find(parts, self._request, self._model, "answer")
        except GuardUnreadableError as error:
            self._outcomes[guard.name] = "unreadable"
            raise UnavailableError(str(error)) from error
        except Exception:
            self._outcomes[guard.name] = "refused" if guard.changes_text else "unchecked"
            raise
        if results is None:
            self._outcomes[guard.name] = "unchecked"
            return found
        for index, spans in zip(places, results, strict=True):
            found[index] = spans
        return found

    def judge_later(self, guard: Guard, texts: Sequence[str]) -> None:
        """Have a guard that only reports judge parts of the answer, without waiting for it."""
        if len(self._tasks) >= MAX_REPORTS:
            self._outcomes[guard.name] = "unchecked"
            return
        task = asyncio.create_task(self._report(guard, texts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_later(self, texts: Sequence[str]) -> None:
        """Check complete texts for the guards that only report."""
        for guard in self.guards:
            self.judge_later(guard, texts)

    async def _report(self, guard: Guard, texts: Sequence[str]) -> None:
        try:
            found = await self._find(guard, texts)
        except RequestError:  # the text is on its way, so even a closed guard lets it pass
            return
        if any(found) and self._outcomes.get(guard.name) not in ("unchecked", "unreadable"):
            self._outcomes[guard.name] = "flagged"

    def found(self, guard: Guard) -> None:
        """Note that a guard found something.

        Raises:
            AnswerBlockedError: The guard ends the answer.
        """
        self._outcomes[guard.name] = guard.outcome
        if guard.config.action == "block":
            raise AnswerBlockedError(f"The guard `{guard.name}` ended the answer.")

    def unreadable(self) -> None:
        """Note that no guard can read the answer."""
        for guard in self.guards:
            self._outcomes[guard.name] = "unreadable"

    async def finish(self) -> None:
        """Wait for the outstanding checks, and count the results of a complete answer."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._count("passed")

    async def abandon(self) -> None:
        """Cancel the outstanding checks; only what was found or failed counts."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._count(None)

    def _count(self, default: GuardOutcome | None) -> None:
        """Count the results, once."""
        if self._is_finished:
            return
        self._is_finished = True
        for guard in self.guards:
            if (outcome := self._outcomes.get(guard.name, default)) is not None:
                self._note(guard, "answer", outcome)


def _only_reports(guard: Guard) -> bool:
    return not guard.changes_text and not isinstance(guard.check, PatternCheck)


async def check_slots(guards: AnswerGuards, texts: DocumentTexts) -> None:
    """Check complete texts in their document.

    Raises:
        AnswerBlockedError: A guard ends the answer.
        UnavailableError: A check failed, and the guard is closed.
    """
    checked = await guards.check([slot.text for slot in texts.slots])
    for slot, text in zip(texts.slots, checked, strict=True):
        if text is None:
            raise AnswerBlockedError
        slot.text = text
    texts.write()
