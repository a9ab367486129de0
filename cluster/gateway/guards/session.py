"""The guards of one request, from its prompt to its answer.

Redaction precedes the engine. Other checks of the prompt run while the engine works on it: the
first byte of the answer waits for them, and a prompt that is blocked is cancelled there.
"""

import asyncio
import json
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from cluster.config.guards import GuardOutcome
from cluster.errors import (
    GuardBlockedError,
    GuardUnreadableError,
    InvalidRequestError,
    RequestError,
    UnavailableError,
)
from cluster.gateway.body import is_json
from cluster.gateway.guards.answer_guards import AnswerGuards
from cluster.gateway.guards.answers import GuardedStream, guard_document
from cluster.gateway.guards.checks import Guard, PatternCheck, Stage, run_sized
from cluster.gateway.guards.prompts import PROMPT_FIELDS, Prompt, read_prompt
from cluster.gateway.messages import (
    GuardNotes,
    Request,
    Response,
    header,
    with_body,
)
from cluster.gateway.pools.pool import Pool
from cluster.guards import DocumentTexts, Placeholders, Span, TextSlot, TooManyValuesError
from cluster.guards.placeholders import MAX_VALUES
from cluster.routing import RequestBody

GUARD_HEADER = b"x-tandem-guard"
_OWN_ROLES = ("assistant", "system", "developer")
"""Roles whose texts classifiers of whole texts need not judge: the model's and the operator's."""
SEVERITY: Sequence[GuardOutcome] = (
    *("passed", "flagged", "redacted", "unreadable", "unchecked", "refused", "blocked"),
)
"""Outcomes of a guard, the worst last."""
_THREAD_BYTES = 256 * 1024  # a thread reads larger bodies; the event loop would stop for 2 ms


class GuardedRequest:
    """The guards' part in one request."""

    def __init__(
        self, guards: Sequence[Guard], request: Request, body: RequestBody, pool: Pool
    ) -> None:
        self._pool = pool
        self._request = request
        self._unreadable = _unreadable(request, body)
        self._is_stored = body.previous_response_id is not None
        self._of_prompt = [guard for guard in guards if guard.config.checks_prompts]
        self._of_answer = [guard for guard in guards if guard.config.checks_answers]
        self._late: Sequence[Guard] = ()  # those that check while the engine works
        self._document = DocumentTexts()
        self._slots: list[TextSlot] = []
        self._texts: list[str] = []
        self._placeholders = Placeholders()
        self._notes = request.guard_notes = GuardNotes()

    async def prepare(self) -> Request:
        """Read the prompt; return the request with what must be redacted replaced.

        Patterns are searched now: that takes microseconds, and the engine need not begin in vain.

        Raises:
            GuardBlockedError: A guard refuses the prompt.
            InvalidRequestError: The guards cannot check the prompt.
            UnavailableError: A check failed, and the guard is closed.
        """
        request = self._request
        if self._unreadable is not None:
            self._refuse_unread([self._unreadable], both=True)
            return request
        if not self._of_prompt or not request.body:
            return request  # the engine answers an empty body with its error
        document = await _decode(request.body)
        prompt = await run_sized(
            len(request.body), partial(read_prompt, request.path, document), _THREAD_BYTES
        )
        self._keep_texts(prompt)
        if not self._texts:
            return request
        self._placeholders = Placeholders(self._texts)
        early, self._late = _divide(self._of_prompt)
        found = await asyncio.gather(
            *(guard.find(self._texts, request, self._pool.name, "prompt") for guard in early),
            return_exceptions=True,
        )
        for guard, result in zip(early, found, strict=True):
            self._note_result(guard, "prompt", result)
        redacted = []
        for guard, result in zip(early, found, strict=True):
            if isinstance(result, BaseException):
                raise result
            _raise_if_blocked(guard, result)
            if guard.config.action == "redact" and result is not None:
                redacted.append(result)
        redact = partial(self._redact, document, redacted)
        prepared = await run_sized(len(request.body), redact, _THREAD_BYTES)
        self._document = DocumentTexts()
        if not self._late:
            self._slots, self._texts = [], []  # the prompt; the answer may be far away
        return prepared

    def _keep_texts(self, prompt: Prompt) -> None:
        self._document, unreadable = prompt
        if self._is_stored and any(each.config.action == "redact" for each in self._of_prompt):
            unreadable.append("`previous_response_id`, whose placeholders are not known")
        self._refuse_unread(unreadable)
        if not unreadable:
            self._slots = self._document.slots
            self._texts = [slot.text for slot in self._slots]

    def _refuse_unread(self, parts: Sequence[str], *, both: bool = False) -> None:
        """Raise if a guard would have to check what it cannot read.

        Args:
            parts: Parts of the request that no guard can read.
            both: True if the answer cannot be read, either.
        """
        if not parts:
            return
        stages: list[tuple[Stage, list[Guard]]] = [("prompt", self._of_prompt)]
        if both:
            stages.append(("answer", self._of_answer))
        for stage, guards in stages:
            for guard in guards:
                self.note(guard, stage, "unreadable")
        for _, guards in stages:
            for guard in guards:
                if guard.changes_text:
                    raise GuardUnreadableError.by(guard.name, parts[0])

    def _redact(self, document: dict[str, Any], found: Sequence[list[list[Span]]]) -> Request:
        has_changed = False
        for slot, *spans in zip(self._slots, *found, strict=True):
            merged = [span for part in spans for span in part]
            if merged:
                slot.text = self._replace(slot.text, merged)
                has_changed = True
        if not has_changed:
            return self._request
        self._document.write()
        # ASCII, because a JSON string may hold half of a surrogate pair, which UTF-8 cannot.
        return with_body(self._request, json.dumps(document, separators=(",", ":")).encode())

    def _replace(self, text: str, spans: Sequence[Span]) -> str:
        try:
            return self._placeholders.replace(text, spans)
        except TooManyValuesError:
            raise InvalidRequestError(
                f"The prompt has more than {MAX_VALUES} values that guards must replace. Split it."
            ) from None

    async def respond(self, relaying: Coroutine[Any, Any, Response]) -> Response:
        """Return the checked answer of a request that is relayed meanwhile.

        Raises:
            GuardBlockedError: A guard refuses the prompt.
            UnavailableError: A check failed, and the guard is closed.
            RequestError: The request failed.
        """
        response = await (self._check_while(relaying) if self._late else relaying)
        self._slots, self._texts = [], []
        if response.status == 200 and self._unreadable is None:
            response = await self._guard_answer(response)
        if self._notes.outcomes:
            response.headers.append((GUARD_HEADER, str(self._notes).encode()))
        return response

    async def _check_while(self, relaying: Coroutine[Any, Any, Response]) -> Response:
        answer = asyncio.ensure_future(relaying)
        verdict = asyncio.ensure_future(self._check_prompt(self._late))
        try:
            await asyncio.wait((answer, verdict), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() or answer.exception() is None:
                await verdict
            return await answer
        except BaseException as error:
            if isinstance(error, RequestError):
                self._notes.status = error.status
            await _discard(answer)
            raise
        finally:
            verdict.cancel()
            await asyncio.gather(verdict, return_exceptions=True)

    async def _check_prompt(self, guards: Sequence[Guard]) -> None:
        """Raise if a guard refuses the prompt; a guard that comes first decides first."""
        checks = [asyncio.ensure_future(self._check_texts(guard)) for guard in guards]
        try:
            for guard, check in zip(guards, checks, strict=True):
                await asyncio.wait((check,))
                error = check.exception()
                found = None if error else check.result()
                self._note_result(guard, "prompt", error or found)
                if error is not None:
                    raise error
                _raise_if_blocked(guard, found)
        finally:
            for check in checks:
                check.cancel()
            await asyncio.gather(*checks, return_exceptions=True)

    async def _check_texts(self, guard: Guard) -> list[list[Span]] | None:
        texts = self._texts
        if not guard.check.finds_parts:
            texts = [slot.text for slot in self._slots if slot.role not in _OWN_ROLES]
        if not texts:
            return []
        return await guard.find(texts, self._request, self._pool.name, "prompt")

    def _note_result(
        self, guard: Guard, stage: Stage, result: list[list[Span]] | BaseException | None
    ) -> None:
        """Count and keep the result of a check: what was found, None if unchecked, or an error."""
        outcome: GuardOutcome = "passed"
        if isinstance(result, UnavailableError):
            outcome = "refused"
        elif isinstance(result, GuardUnreadableError):
            outcome = "unreadable"
        elif isinstance(result, BaseException):
            return  # the client disconnected
        elif result is None:
            outcome = "unchecked"
        elif any(result):
            outcome = guard.outcome
        self.note(guard, stage, outcome)

    def note(self, guard: Guard, stage: Stage, outcome: GuardOutcome) -> None:
        """Count a result, and keep it if it is worse than an earlier one of the same guard."""
        guard.count(self._pool.name, stage, outcome)
        known = self._notes.outcomes.get(guard.name, "passed")
        if SEVERITY.index(outcome) > SEVERITY.index(known):
            self._notes.outcomes[guard.name] = outcome

    async def _guard_answer(self, response: Response) -> Response:
        if not self._of_answer and not self._placeholders:
            return response
        guards = AnswerGuards(
            self._of_answer, self._placeholders, self._request, self._pool.name, self.note
        )
        content_type = header(response.headers, b"content-type") or ""
        if content_type.startswith("text/event-stream"):
            stream = GuardedStream(response.body, self._request.path, guards, self._notes)
            return Response(response.status, response.headers, stream)
        if content_type.startswith("application/json"):
            return await guard_document(response, self._request.path, guards)
        if guards.change_text:
            await response.body.aclose()
            await guards.abandon()
            raise UnavailableError(
                f"Guards cannot check an answer with the content type {content_type!r}."
            )
        guards.unreadable()
        await guards.finish()
        return response


def _unreadable(request: Request, body: RequestBody) -> str | None:
    """Return what guards cannot read at all; None if they can."""
    if request.method != "POST" or request.path not in PROMPT_FIELDS:
        return f"{request.path}; it checks {', '.join(PROMPT_FIELDS)}"
    return "a body that is not JSON" if not is_json(body) and request.body else None


async def _decode(body: bytes) -> Any:
    try:
        return await run_sized(len(body), partial(json.loads, body), _THREAD_BYTES)
    # Invalid UTF-8 in fields that the router does not read, huge integers, or thousands of levels.
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None


def _divide(guards: Sequence[Guard]) -> tuple[list[Guard], list[Guard]]:
    """Return the guards that must, or can at once, decide before the engine; and the others."""
    early = [
        guard
        for guard in guards
        if guard.config.action == "redact" or isinstance(guard.check, PatternCheck)
    ]
    return early, [guard for guard in guards if guard not in early]


def _raise_if_blocked(guard: Guard, found: list[list[Span]] | None) -> None:
    labels = sorted({span.label for spans in found or () for span in spans})
    if labels and guard.config.action == "block":
        raise GuardBlockedError.by(guard.name, ", ".join(labels))


async def _discard(answer: "asyncio.Future[Response]") -> None:
    """Cancel a request, or drop its answer if that has begun."""
    answer.cancel()
    (result,) = await asyncio.gather(answer, return_exceptions=True)
    if isinstance(result, Response):
        await result.body.aclose()
