"""Summaries of texts of any length, by map and reduce over parts that fit the model's context."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from cluster.applications import languages
from cluster.applications.chunks import Part, divide, sentences
from cluster.applications.evidence import Evidence
from cluster.applications.tasks.base import Run, turns
from cluster.errors import UnprocessableError
from cluster.tasks import SummarizeRequest, SummarizeResult
from cluster.tasks.results import Chunk, SummarySentence

LENGTHS = {
    "short": ("one or two sentences", 80),
    "medium": ("one paragraph", 200),
    "long": ("several paragraphs", 500),
}
"""Words of the prompt, and the default of ``max_tokens``."""
STYLES = {"paragraph": "as prose", "bullets": "as a bulleted list", "headline": "as a headline"}
_PART_SHARE = 4  # the summary of a part takes at most this fraction of the part's tokens


@dataclass(frozen=True, slots=True)
class _Summarizer:
    request: SummarizeRequest
    run: Run
    model: str
    max_tokens: int

    def messages(self, template: str, text: str) -> list[dict[str, str]]:
        request = self.request
        language = request.language
        values = {
            "text": text,
            "length": LENGTHS[request.length][0],
            "style": STYLES[request.style],
            "language": languages.name_of(language) if language else "the language of the text",
        }
        return self.run.prompts[template].messages(values, turns(request))

    async def divide(self, template: str, text: str) -> list[Part]:
        free = await self.run.free_tokens(self.model, self.messages(template, ""))
        return await divide(text, free - self.max_tokens, partial(self.run.count, self.model))

    async def summarize(self, template: str, text: str, part: Part) -> str:
        done = await self.run.calls.chat(
            self.messages(template, part.of(text)),
            self.model,
            max_tokens=min(self.max_tokens, max(32, part.tokens // _PART_SHARE)),
            temperature=self.request.temperature,
        )
        return done.text.strip()


async def summarize(
    request: SummarizeRequest, run: Run
) -> AsyncGenerator[str | SummarizeResult, None]:
    """Summarize a text: each part, then the summaries, until one call can merge them."""
    model = run.generator(request.model)
    max_tokens = request.max_tokens or LENGTHS[request.length][1]
    summarizer = _Summarizer(request, run, model, max_tokens)
    template, text = "summarize", request.text
    chunks = parts = await summarizer.divide(template, text)
    while len(parts) > 1:
        notes = await run.calls.map(partial(summarizer.summarize, template, text), parts)
        template, text = "summarize-merge", "\n\n".join(notes)
        before, parts = len(parts), await summarizer.divide("summarize-merge", text)
        if len(parts) >= before:
            raise UnprocessableError(
                f"The summaries of {before} parts are not shorter than the parts. Set a lower "
                "`max_tokens`, or use another model."
            )
    pieces: list[str] = []
    finish_reason = None
    messages = summarizer.messages(template, text)
    sampling = {"max_tokens": max_tokens, "temperature": request.temperature}
    async with aclosing(run.calls.stream(messages, model, **sampling)) as deltas:
        async for delta in deltas:
            finish_reason = delta.finish_reason or finish_reason
            if delta.text:
                pieces.append(delta.text)
                yield delta.text
    summary = "".join(pieces)
    sources = None
    if request.references:
        sources = await asyncio.to_thread(_sentences, summary, request.text)
    yield SummarizeResult(
        **run.result_fields("summarize", model),
        summary=summary,
        finish_reason=finish_reason,
        chunks=[Chunk(start=c.start, end=c.end, tokens=c.tokens) for c in chunks],
        sentences=sources,
    )


def _sentences(summary: str, text: str) -> list[SummarySentence]:
    evidence = Evidence.of_sentences(text)
    return [
        SummarySentence(text=part.of(summary), references=evidence.references(part.of(summary)))
        for part in sentences(summary)
    ]
