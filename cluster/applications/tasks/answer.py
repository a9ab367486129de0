"""Answers to questions from documents in the request, with citations."""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.applications.chunks import Part, passages, sentences
from cluster.applications.evidence import MIN_SCORE, Evidence
from cluster.applications.tasks.base import Run, turns
from cluster.errors import InvalidRequestError
from cluster.tasks import AnswerRequest, AnswerResult
from cluster.tasks.results import Citation

PASSAGE_CHARS = 1200
"""Longest passage: about 300 tokens of English."""
MAX_TOKENS = 300
"""Default of ``max_tokens``."""
SENTINEL = "NOT IN THE DOCUMENTS"
"""The model's answer if the passages do not contain it."""
_AROUND_SENTINEL = " \n.\"'`*"
_MARK = re.compile(r"\[(\d{1,4})\]")


@dataclass(frozen=True, slots=True)
class _Passage:
    document: str
    part: Part
    text: str
    score: float


async def answer(request: AnswerRequest, run: Run) -> AsyncGenerator[str | AnswerResult, None]:
    """Answer a question from the most relevant passages that fit the model's context."""
    model = run.generator(request.model)
    ids = [document.id or str(index) for index, document in enumerate(request.documents)]
    if len(set(ids)) < len(ids):
        raise InvalidRequestError("documents: each id may occur once", param="documents")
    ranked = await asyncio.to_thread(_rank, request, ids)
    relevance = ranked[0].score if ranked else 0.0
    if relevance < request.threshold or not ranked:
        yield _result(request, run, model, relevance, [], None, None)
        return
    chosen = await _fitting(request, run, model, ranked)
    pieces: list[str] = []
    held = ""
    finish_reason = None
    stream = run.calls.stream(
        _messages(request, run, chosen),
        model,
        max_tokens=request.max_tokens or MAX_TOKENS,
        temperature=request.temperature,
    )
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            finish_reason = delta.finish_reason or finish_reason
            pieces.append(delta.text)
            held += delta.text
            if held and not _may_become_sentinel(held):
                yield held
                held = ""
    text = "".join(pieces).strip()
    if held and not _is_sentinel(text):
        yield held
    found = text if text and not _is_sentinel(text) else None
    yield _result(request, run, model, relevance, chosen, found, finish_reason)


def _rank(request: AnswerRequest, ids: Sequence[str]) -> list[_Passage]:
    """Return the passages that share words with the question, most relevant first."""
    found = [
        (id_, document.text, part)
        for id_, document in zip(ids, request.documents, strict=True)
        for part in passages(document.text, PASSAGE_CHARS)
    ]
    evidence = _index([part.of(text) for _, text, part in found])
    ranking = evidence.rank(request.question, request.max_passages)
    return [
        _Passage(found[index][0], found[index][2], found[index][2].of(found[index][1]), score)
        for index, score in ranking
    ]


def _messages(request: AnswerRequest, run: Run, chosen: list[_Passage]) -> list[dict[str, str]]:
    numbered = [f"[{number}] {passage.text}" for number, passage in enumerate(chosen, 1)]
    values = {
        "question": request.question,
        "passages": "\n\n".join(numbered),
        "sentinel": SENTINEL,
    }
    examples = [({"question": changes["text"]}, text) for changes, text in turns(request)]
    return run.prompts["answer"].messages(values, examples)


async def _fitting(
    request: AnswerRequest, run: Run, model: str, ranked: list[_Passage]
) -> list[_Passage]:
    """Return as many of the best passages as fit the context, at least one."""
    max_tokens = request.max_tokens or MAX_TOKENS
    while len(ranked) > 1:
        if await run.free_tokens(model, _messages(request, run, ranked)) >= max_tokens:
            break
        ranked = ranked[: -max(1, len(ranked) // 4)]
    return ranked


def _may_become_sentinel(text: str) -> bool:
    return SENTINEL.startswith(text.lstrip(_AROUND_SENTINEL).upper()[: len(SENTINEL)])


def _is_sentinel(text: str) -> bool:
    return text.strip(_AROUND_SENTINEL).upper() == SENTINEL


def _result(
    request: AnswerRequest,
    run: Run,
    model: str,
    relevance: float,
    chosen: list[_Passage],
    text: str | None,
    finish_reason: str | None,
) -> AnswerResult:
    return AnswerResult(
        **run.result_fields("answer", model),
        answer=text,
        found=text is not None,
        relevance=relevance,
        citations=[] if text is None else _citations(text, chosen),
        finish_reason=finish_reason,
    )


def _citations(text: str, chosen: list[_Passage]) -> list[Citation]:
    """Return the passages that the answer names; without any, those that share its words."""
    named = {int(number) for number in _MARK.findall(text)}
    numbers = sorted(number for number in named if 1 <= number <= len(chosen))
    if not numbers:
        numbers = sorted(_supporting(text, chosen))
    return [
        Citation(
            number=number,
            document=chosen[number - 1].document,
            start=chosen[number - 1].part.start,
            end=chosen[number - 1].part.end,
            text=chosen[number - 1].text,
            score=chosen[number - 1].score,
        )
        for number in numbers
    ]


def _supporting(text: str, chosen: list[_Passage]) -> set[int]:
    """Return the numbers of the passages that share most words with a sentence of the answer."""
    evidence = _index([passage.text for passage in chosen])
    ranked = (evidence.rank(part.of(text), 1, MIN_SCORE) for part in sentences(text))
    return {index + 1 for found in ranked for index, _ in found}


def _index(texts: Sequence[str]) -> Evidence:
    places: list[Part] = []
    start = 0
    for text in texts:
        places.append(Part(start, start + len(text)))
        start += len(text)
    return Evidence("".join(texts), places)
