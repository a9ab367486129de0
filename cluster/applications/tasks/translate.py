"""Translation by paragraph: in parallel, in order, with the paragraph before as context."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from cluster.applications import languages
from cluster.applications.chunks import divide
from cluster.applications.markdown import (
    Segment,
    around_protected,
    blocks,
    paragraphs,
    protect,
    restore,
)
from cluster.applications.tasks.base import Run, turns
from cluster.errors import PayloadTooLargeError
from cluster.tasks import TranslateRequest, TranslateResult

MAX_SEGMENTS = 2000
CONTEXT_CHARS = 600
"""End of the paragraph before that the model sees."""
_PROMPT_SHARE = 3  # the text of a call takes at most this fraction of the free context
_MIN_TOKENS, _TOKENS_PER_BYTE = 64, 2
"""Bound of a translation: far more than any language needs, because a token has a byte or more."""
_FORMALITIES = {
    "default": "",
    "formal": "Address the reader formally.",
    "informal": "Address the reader informally.",
}
_FORMATS = {
    "text": "",
    "markdown": "Keep Markdown marks, and placeholders such as [[1]], as they are.",
}


class _Job(NamedTuple):
    """Segment to translate, and the end of the one before."""

    text: str
    context: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """Translation of one segment."""

    text: str
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Translator:
    request: TranslateRequest
    run: Run
    model: str
    source: str
    max_tokens: int

    def messages(self, text: str, context: str) -> list[dict[str, str]]:
        request = self.request
        folded = text.casefold()
        terms = [
            f"- {term}: {translation}"
            for term, translation in request.glossary.items()
            if term.casefold() in folded
        ]
        values = {
            "text": text,
            "source": languages.name_of(self.source),
            "target": languages.name_of(request.target),
            "glossary": "\n".join(["Translate these terms so:", *terms]) if terms else "",
            "formality": _FORMALITIES[request.formality],
            "format": _FORMATS[request.format],
            "context": f"The text before, for context only:\n\n{context}" if context else "",
        }
        return self.run.prompts["translate"].messages(values, turns(request))

    async def translate(self, text: str, context: str) -> _Piece:
        done = await self.run.calls.chat(
            self.messages(text, context),
            self.model,
            # A small model may repeat itself without end.
            max_tokens=min(self.max_tokens, _MIN_TOKENS + _TOKENS_PER_BYTE * len(text.encode())),
            temperature=self.request.temperature,
        )
        return _Piece(done.text.strip(), done.finish_reason == "length")

    async def translate_segment(self, job: _Job) -> _Piece:
        """Translate a segment, and return what Markdown protects in it unchanged."""
        if self.request.format == "text":
            return await self.translate(*job)
        masked, kept = protect(job.text)
        piece = await self.translate(masked, job.context)
        if not kept:
            return piece
        restored = restore(piece.text, kept)
        if restored is not None:
            return _Piece(restored, piece.is_cut)
        # The model lost a placeholder, so what is between them is translated alone.
        pieces = [
            await self.translate(part.text, "") if part.translates else _Piece(part.text)
            for part in around_protected(job.text)
        ]
        return _Piece("".join(p.text for p in pieces), any(p.is_cut for p in pieces))


async def translate(
    request: TranslateRequest, run: Run
) -> AsyncGenerator[str | TranslateResult, None]:
    """Translate a text; yield each paragraph when all before it are translated."""
    model = run.generator(request.model)
    source = request.source or ""
    if not source:
        source = await asyncio.to_thread(languages.detect, request.text)
    probe = _Translator(request, run, model, source, 0)
    # All terms, and the longest context.
    everything = probe.messages(" ".join(request.glossary), "x" * CONTEXT_CHARS)
    free = await run.free_tokens(model, everything)
    budget = free // _PROMPT_SHARE
    max_tokens = request.max_tokens or max(1, free - budget)
    translator = _Translator(request, run, model, source, max_tokens)
    parts = await _divide(request, run, model, budget)
    num_segments = sum(part.translates for part in parts)
    if num_segments > MAX_SEGMENTS:
        raise PayloadTooLargeError(
            f"The text has {num_segments} segments; the limit is {MAX_SEGMENTS}. Split it."
        )
    pieces: list[_Piece] = []
    jobs = _jobs(parts)
    async with aclosing(run.calls.results(translator.translate_segment, jobs)) as translated:
        for part in parts:
            piece = await anext(translated) if part.translates else _Piece(part.text)
            pieces.append(piece)
            if piece.text:
                yield piece.text
    translation = "".join(piece.text for piece in pieces)
    yield TranslateResult(
        **run.result_fields("translate", model),
        translation=translation,
        source=source,
        detected=request.source is None,
        target=request.target,
        segments=num_segments,
        missing_terms=_missing_terms(request, translation),
        truncated=any(piece.is_cut for piece in pieces),
    )


async def _divide(
    request: TranslateRequest, run: Run, model: str, budget_tokens: int
) -> list[Segment]:
    """Return the parts of the text; long segments are divided by sentences."""
    parts = list((blocks if request.format == "markdown" else paragraphs)(request.text))
    texts = [part.text for part in parts if part.translates]
    # A token has at least one byte, so shorter segments need no count.
    if all(len(text.encode()) <= budget_tokens for text in texts):
        return parts
    divided: list[Segment] = []
    for part in parts:
        if not part.translates or len(part.text.encode()) <= budget_tokens:
            divided.append(part)
            continue
        start = 0
        for piece in await divide(part.text, budget_tokens, partial(run.count, model)):
            divided.append(Segment(part.text[start : piece.start], False))
            divided.append(Segment(piece.of(part.text), True))
            start = piece.end
        divided.append(Segment(part.text[start:], False))
    return divided


def _jobs(parts: Sequence[Segment]) -> list[_Job]:
    jobs, context = [], ""
    for part in parts:
        if part.translates:
            jobs.append(_Job(part.text, context))
            context = part.text[-CONTEXT_CHARS:]
    return jobs


def _missing_terms(request: TranslateRequest, translation: str) -> list[str]:
    source, result = request.text.casefold(), translation.casefold()
    return [
        term
        for term, wanted in request.glossary.items()
        if term.casefold() in source and wanted.casefold() not in result
    ]
