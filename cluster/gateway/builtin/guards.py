"""``POST /v1/guards/test``: what the guards find in texts, without a generator."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from cluster.config import GuardAction
from cluster.config.guards import GuardOutcome
from cluster.errors import InvalidRequestError, PayloadTooLargeError, PermissionDeniedError
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.gateway.guards import Guards
from cluster.gateway.guards.checks import CheckFailedError, Guard, run_sized
from cluster.gateway.guards.session import SEVERITY
from cluster.gateway.messages import Request, Response, json_response
from cluster.gateway.recording.request_log import CLIENT_DISCONNECTED
from cluster.guards import Placeholders, Span

GUARDS_PATH = "/v1/guards/test"
MAX_TEXTS = 256
MAX_CHARS = 1024 * 1024
"""Characters of all texts of a request."""
CHARS_PER_TOKEN = 4
"""Estimate for English, by which the classifiers' work is charged."""


class GuardTestRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/guards/test``."""

    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_TEXTS)]
    """Text or texts to check."""
    stage: Literal["prompt", "answer"] = "prompt"
    """Text that is checked: the guards of prompts or of answers."""
    guards: list[str] | None = None
    """Guards to use; the default is those of the API key."""


class FoundPart(TypedDict):
    """A part of a text, or its label."""

    label: str
    score: float
    start: int
    end: int


class GuardResult(TypedDict):
    """Result of one guard for one text."""

    guard: str
    action: GuardAction
    outcome: GuardOutcome
    found: list[FoundPart]


class GuardedText(TypedDict):
    """Results of all guards for one text."""

    index: int
    outcome: GuardOutcome
    """The most severe outcome of a guard."""
    text: str
    """The text with placeholders, as the engine or the client would get it."""
    guards: list[GuardResult]


class GuardTest(TypedDict):
    """Results for all texts, in order."""

    object: Literal["list"]
    data: list[GuardedText]


_decode = msgspec.json.Decoder(GuardTestRequest).decode


class GuardRoutes:
    """Handler of the path."""

    def __init__(self, guards: Guards, quotas: TenantQuotas) -> None:
        self._guards = guards
        self._quotas = quotas

    async def test(self, request: Request) -> Response:
        """Return what each guard finds in each text."""
        try:
            body = _decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"Invalid request body: {error}") from None
        guards = self._select(request, body)
        texts = [body.input] if isinstance(body.input, str) else body.input
        num_chars = sum(map(len, texts))
        if num_chars > MAX_CHARS:
            raise PayloadTooLargeError(
                f"The texts have {num_chars} characters; the limit is {MAX_CHARS}. Send fewer."
            )
        tokens = (
            num_chars
            / CHARS_PER_TOKEN
            * sum(guard.config.classifier is not None for guard in guards)
        )
        ticket = self._quotas.admit(request.identity, "", (tokens, tokens))
        status = CLIENT_DISCONNECTED
        try:
            found = await asyncio.gather(*(_find(guard, texts, request) for guard in guards))
            data = await run_sized(num_chars, partial(_results, texts, guards, found))
            status = 200
        finally:
            ticket.end(status, None, True)
        return json_response({"object": "list", "data": data})

    def _select(self, request: Request, body: GuardTestRequest) -> list[Guard]:
        if body.guards is None:
            guards = self._guards.guards_of(request.identity)
        else:
            names = self._guards.check_names(body.guards, "guards")
            guards = [guard for guard in self._guards if guard.name in names]
            own = {guard.name for guard in self._guards.guards_of(request.identity)}
            for guard in guards:
                model = guard.config.classifier
                if (
                    model is not None
                    and guard.name not in own
                    and not request.identity.allows(model)
                ):
                    raise PermissionDeniedError(
                        f"The API key does not allow the classifier `{model}` of the guard "
                        f"`{guard.name}`.",
                        param="guards",
                    )
        is_prompt = body.stage == "prompt"
        return [
            guard
            for guard in guards
            if (guard.config.checks_prompts if is_prompt else guard.config.checks_answers)
        ]


async def _find(
    guard: Guard, texts: Sequence[str], request: Request
) -> list[list[Span]] | list[None]:
    try:
        return await guard.check.find(texts, request)
    except CheckFailedError:
        return [None] * len(texts)


def _results(
    texts: Sequence[str],
    guards: Sequence[Guard],
    found: Sequence[Sequence[list[Span] | None]],
) -> list[GuardedText]:
    return [
        _result(index, text, guards, [of_guard[index] for of_guard in found])
        for index, text in enumerate(texts)
    ]


def _result(
    index: int, text: str, guards: Sequence[Guard], found: Sequence[list[Span] | None]
) -> GuardedText:
    results = []
    spans: list[Span] = []
    for guard, parts in zip(guards, found, strict=True):
        outcome: GuardOutcome = "unchecked" if guard.config.on_error == "open" else "refused"
        if parts is not None:
            outcome = guard.outcome if parts else "passed"
        if guard.config.action == "redact":
            spans += parts or ()
        results.append(_guard_result(guard, outcome, parts or ()))
    outcomes: list[GuardOutcome] = [result["outcome"] for result in results]
    worst: GuardOutcome = max(outcomes, key=SEVERITY.index) if outcomes else "passed"
    redacted = Placeholders([text]).replace(text, spans)
    return GuardedText(index=index, outcome=worst, text=redacted, guards=results)


def _guard_result(guard: Guard, outcome: GuardOutcome, spans: Sequence[Span]) -> GuardResult:
    found: list[Any] = [span._asdict() for span in spans]
    return GuardResult(guard=guard.name, action=guard.config.action, outcome=outcome, found=found)
