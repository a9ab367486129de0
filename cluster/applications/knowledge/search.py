"""Searches in a knowledge base, and answers from what they find."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.applications.knowledge.encoder import Encoder, Vectors
from cluster.applications.knowledge.ingest import check_dimensions
from cluster.applications.knowledge.reranking import Reranking
from cluster.applications.knowledge.table import Table
from cluster.applications.tasks import Run
from cluster.applications.tasks.answer import (
    RankedPassage,
    cite,
    generate_answer,
    index_texts,
)
from cluster.tasks.knowledge import (
    KnowledgeAnswer,
    KnowledgeAnswerRequest,
    KnowledgeCitation,
    Mode,
    Passage,
    SearchRequest,
    SearchResult,
)

MIN_CANDIDATES = 50
"""Passages that each search finds before they are fused and reranked."""


@dataclass(frozen=True, slots=True)
class Query:
    """Query of a search or an answer."""

    text: str
    mode: Mode
    limit: int
    reranker: str | None


async def search(
    table: Table, request: SearchRequest, run: Run, reranking: Reranking
) -> SearchResult:
    """Return the passages for a query, best first."""
    reranker = run.config.knowledge.reranker if request.rerank else None
    query = Query(request.query, request.mode, request.limit, reranker)
    passages, reranked = await find(table, query, run, reranking)
    return SearchResult(
        **run.result_fields("knowledge-search", table.settings.model),
        mode=request.mode,
        reranked=reranked,
        passages=passages,
    )


async def answer(
    table: Table, request: KnowledgeAnswerRequest, run: Run, reranking: Reranking
) -> AsyncGenerator[str | KnowledgeAnswer, None]:
    """Answer a question from the best passages, if one is relevant enough."""
    model = run.generator(request.model)
    config = run.config.knowledge
    threshold = config.threshold if request.threshold is None else request.threshold
    question = request.question
    query = Query(question, request.mode, request.max_passages, config.reranker)
    passages, reranked = await find(table, query, run, reranking)
    relevance = max((passage.relevance for passage in passages), default=0.0)
    ranked = [_ranked(passage) for passage in passages]
    relevant = ranked if relevance >= threshold else []
    async with aclosing(generate_answer(question, relevant, request, run, model)) as items:
        async for item in items:
            if isinstance(item, str):
                yield item
            else:
                yield KnowledgeAnswer(
                    **run.result_fields("knowledge-answer", model),
                    answer=item.text,
                    found=item.text is not None,
                    relevance=relevance,
                    threshold=threshold,
                    reranked=reranked,
                    citations=[
                        _cite(index, ranked[index], passages[index]) for index in item.cited
                    ],
                    finish_reason=item.finish_reason,
                )


async def find(
    table: Table, query: Query, run: Run, reranking: Reranking
) -> tuple[list[Passage], bool | None]:
    """Return the passages, best first, and whether they are reranked."""
    encoder = Encoder(table.settings.model, run.calls)
    (vector,) = vectors = await encoder.embed([query.text])
    check_dimensions(table, vectors)
    rows = await table.search(query.text, vector, query.mode, max(query.limit, MIN_CANDIDATES))
    ordered = await reranking.order(rows, query.text, query.reranker, run)
    best = ordered.rows[: query.limit]
    passages = await asyncio.to_thread(_passages, query.text, vector, best)
    return passages, ordered.reranked


def _passages(query: str, vector: Vectors, rows: Sequence[dict[str, Any]]) -> list[Passage]:
    shares = dict(index_texts([row["content"] for row in rows]).rank(query, len(rows)))
    return [_passage(row, vector, shares.get(index, 0.0)) for index, row in enumerate(rows)]


def _passage(row: dict[str, Any], vector: Vectors, share: float) -> Passage:
    similarity = float(np.dot(vector, np.asarray(row["vector"], np.float32)))
    return Passage(
        document=row["document"],
        heading=row["heading"],
        page=row["page"],
        start=row["start"],
        end=row["end"],
        text=row["content"][row["text_at"] :],
        similarity=round(similarity, 4),
        relevance=round(min(1.0, max(similarity, share, 0.0)), 4),
    )


def _ranked(passage: Passage) -> RankedPassage:
    text = passage.text
    if passage.heading and passage.heading[-1] not in text:  # it says what the passage is about
        text = f"{passage.heading[-1]}\n{text}"
    return RankedPassage(passage.document, passage.start, passage.end, text, passage.relevance)


def _cite(index: int, ranked: RankedPassage, passage: Passage) -> KnowledgeCitation:
    fields = {**cite(index, ranked).model_dump(), "text": passage.text}
    return KnowledgeCitation(**fields, heading=passage.heading, page=passage.page)
