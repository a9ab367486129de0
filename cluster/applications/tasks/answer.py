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
from cluster.tasks.requests import GenerativeRequest
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
class RankedPassage:
    """Passage to answer from, from character ``start`` up to ``end`` of its document."""

    document: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """Answer of a generator; None if it found none in the passages."""

    text: str | None
    finish_reason: str | None
    cited: list[int]
    """Positions of the passages that the answer refers to, from 0."""


async def answer(request: AnswerRequest, run: Run) -> AsyncGenerator[str | AnswerResult, None]:
    """Answer a question from the most relevant passages that fit the model's context."""
    model = run.generator(request.model)
    ids = [document.id or str(index) for index, document in enumerate(request.documents)]
    if len(set(ids)) < len(ids):
        raise InvalidRequestError("documents: each id may occur once", param="documents")
    ranked = await asyncio.to_thread(_rank, request, ids)
    relevance = ranked[0].score if ranked else 0.0
    relevant = ranked if relevance >= request.threshold else []
    async with aclosing(generate_answer(request.question, relevant, request, run, model)) as items:
        async for item in items:
            if isinstance(item, str):
                yield item
            else:
                yield AnswerResult(
                    **run.result_fields("answer", model),
                    answer=item.text,
                    found=item.text is not None,
                    relevance=relevance,
                    citations=[cite(index, ranked[index]) for index in item.cited],
                    finish_reason=item.finish_reason,
                )


def _rank(request: AnswerRequest, ids: Sequence[str]) -> list[RankedPassage]:
    """Return the passages that share words with the question, most relevant first."""
    found = [
        (id_, document.text, part)
        for id_, document in zip(ids, request.documents, strict=True)
        for part in passages(document.text, PASSAGE_CHARS)
    ]
    evidence = index_texts([part.of(text) for _, text, part in found])
    ranking = evidence.rank(request.question, request.max_passages)
    return [
        RankedPassage(id_, part.start, part.end, part.of(text), score)
        for (id_, text, part), score in ((found[index], score) for index, score in ranking)
    ]


async def generate_answer(
    question: str,
    ranked: Sequence[RankedPassage],
    request: GenerativeRequest,
    run: Run,
    model: str,
) -> AsyncGenerator[str | GeneratedAnswer, None]:
    """Yield the pieces of a generator's answer from passages, and then the whole answer.

    Args:
        question: The question.
        ranked: The passages, best first; as many as fit the context are used, at least one. If
            there are none, there is no answer.
        request: Sampling and examples.
        run: The request's context.
        model: The generator.
    """
    if not ranked:
        yield GeneratedAnswer(None, None, [])
        return
    max_tokens = request.max_tokens or MAX_TOKENS
    chosen = list(ranked)
    while len(chosen) > 1:
        messages = _messages(question, chosen, request, run)
        if await run.free_tokens(model, messages) >= max_tokens:
            break
        chosen = chosen[: -max(1, len(chosen) // 4)]
    pieces: list[str] = []
    held = ""
    finish_reason = None
    stream = run.calls.stream(
        _messages(question, chosen, request, run),
        model,
        max_tokens=max_tokens,
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
    if not text or _is_sentinel(text):
        yield GeneratedAnswer(None, finish_reason, [])
    else:
        yield GeneratedAnswer(text, finish_reason, _cited(text, chosen))


def _messages(
    question: str, chosen: Sequence[RankedPassage], request: GenerativeRequest, run: Run
) -> list[dict[str, str]]:
    numbered = [f"[{number}] {passage.text}" for number, passage in enumerate(chosen, 1)]
    values = {"question": question, "passages": "\n\n".join(numbered), "sentinel": SENTINEL}
    examples = [({"question": changes["text"]}, text) for changes, text in turns(request)]
    return run.prompts["answer"].messages(values, examples)


def _may_become_sentinel(text: str) -> bool:
    return SENTINEL.startswith(text.lstrip(_AROUND_SENTINEL).upper()[: len(SENTINEL)])


def _is_sentinel(text: str) -> bool:
    return text.strip(_AROUND_SENTINEL).upper() == SENTINEL


def cite(index: int, passage: RankedPassage) -> Citation:
    """Return the citation of the passage at a position, from 0."""
    return Citation(
        number=index + 1,
        document=passage.document,
        start=passage.start,
        end=passage.end,
        text=passage.text,
        score=passage.score,
    )


def _cited(text: str, chosen: Sequence[RankedPassage]) -> list[int]:
    """Return the passages that the answer names; without any, those that share its words."""
    named = {int(number) for number in _MARK.findall(text)}
    indexes = sorted(number - 1 for number in named if 1 <= number <= len(chosen))
    return indexes or sorted(_supporting(text, chosen))


def _supporting(text: str, chosen: Sequence[RankedPassage]) -> set[int]:
    """Return the passages that share most words with a sentence of the answer."""
    evidence = index_texts([passage.text for passage in chosen])
    ranked = (evidence.rank(part.of(text), 1, MIN_SCORE) for part in sentences(text))
    return {index for found in ranked for index, _ in found}


def index_texts(texts: Sequence[str]) -> Evidence:
    """Return an index of the words of texts."""
    places: list[Part] = []
    start = 0
    for text in texts:
        places.append(Part(start, start + len(text)))
        start += len(text)
    return Evidence("".join(texts), places)
