"""API of Infinity, whose client always sends ``raw_scores`` to ``/classify`` and ``/rerank``."""

from typing import Any

from msgspec import Struct

from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.endpoints import Translation, has_field
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.classify import (
    Classify,
    ClassifyReply,
    ClassifyRequest,
    Score,
)
from cluster.engines.classifier.serving.tasks.rerank import Rerank, RerankReply, RerankRequest

API = "Infinity"


class InfinityClassifyBody(Struct, frozen=True, kw_only=True):
    """Texts to classify."""

    model: str | None = None
    input: str | list[str]
    raw_scores: bool = False


class InfinityClassifyReply(Struct, frozen=True, kw_only=True):
    """Labels of each text, best first."""

    object: str = "classify"
    data: list[list[Score]]
    model: str
    usage: schema.ReplyUsage
    id: str
    created: int


def _to_classify(body: InfinityClassifyBody) -> ClassifyRequest:
    texts = [body.input] if isinstance(body.input, str) else body.input
    activation = False if body.raw_scores else None
    return ClassifyRequest(model=body.model, input=[*texts], use_activation=activation)


def _from_classify(
    _body: InfinityClassifyBody, reply: ClassifyReply, _task: Task[Any]
) -> InfinityClassifyReply:
    return InfinityClassifyReply(
        data=[item.scores for item in reply.data],
        model=reply.model,
        usage=reply.usage,
        id=reply.id,
        created=reply.created,
    )


class InfinityRerankBody(Struct, frozen=True, kw_only=True):
    """A query and documents to sort by their relevance to it."""

    model: str | None = None
    query: str
    documents: list[str]
    top_n: schema.AtLeastOne | None = None
    return_documents: bool = False
    raw_scores: bool = False


class InfinityRanked(Struct, frozen=True, kw_only=True):
    """Relevance of one document; ``index`` is its index in the request."""

    relevance_score: float
    index: int
    document: str | None = None


class InfinityRerankReply(Struct, frozen=True, kw_only=True):
    """Documents, most relevant first."""

    object: str = "rerank"
    results: list[InfinityRanked]
    model: str
    usage: schema.ReplyUsage
    id: str
    created: int


def _to_rerank(body: InfinityRerankBody) -> RerankRequest:
    return RerankRequest(
        model=body.model,
        query=body.query,
        documents=[*body.documents],
        top_n=body.top_n,
        use_activation=False if body.raw_scores else None,
    )


def _from_rerank(
    body: InfinityRerankBody, reply: RerankReply, _task: Task[Any]
) -> InfinityRerankReply:
    documents = body.documents if body.return_documents else [None] * len(body.documents)
    results = [
        InfinityRanked(
            relevance_score=r.relevance_score, index=r.index, document=documents[r.index]
        )
        for r in reply.results
    ]
    return InfinityRerankReply(
        results=results, model=reply.model, usage=reply.usage, id=reply.id, created=reply.created
    )


_raw_scores = has_field("raw_scores")
TRANSLATIONS = (
    Translation(
        API,
        ("/classify",),
        Classify,
        InfinityClassifyBody,
        InfinityClassifyReply,
        _to_classify,
        _from_classify,
        _raw_scores,
    ),
    Translation(
        API,
        ("/rerank",),
        Rerank,
        InfinityRerankBody,
        InfinityRerankReply,
        _to_rerank,
        _from_rerank,
        _raw_scores,
    ),
)
