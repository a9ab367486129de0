"""``/rerank``: documents by relevance to a query, in the format of Cohere and Jina."""

from dataclasses import replace
from uuid import uuid4

import numpy as np
from msgspec import UNSET, Struct, UnsetType, structs

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.engines.classifier.serving.tasks.score import ScoredWindow


class Document(Struct, frozen=True):
    """A document; other fields are ignored."""

    text: str


class RerankRequest(schema.WindowedRequest, frozen=True, kw_only=True):
    """Body of ``POST /rerank``.

    Long documents are cut unless ``truncate`` is false or a stride is set, because clients of
    Cohere and Jina do not expect an error.
    """

    query: str
    documents: list[str | Document]
    top_n: schema.AtLeastOne | None = None
    """Number of documents to return, best first; null returns all."""
    return_documents: bool = False
    max_tokens_per_doc: schema.AtLeastOne | None = None
    """Number of tokens read of each document (Cohere)."""
    priority: int | None = None
    """Ignored (Cohere); a request's class comes from its key or its header."""


class Ranked(Struct, frozen=True):
    """Relevance of one document; ``index`` is its index in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET
    windows: list[ScoredWindow] | UnsetType = UNSET


class RerankTokens(Struct, frozen=True):
    """Number of tokens in Cohere's format."""

    input_tokens: int


class ApiVersion(Struct, frozen=True):
    """Version of Cohere's API that the format follows."""

    version: str = "2"


class RerankMeta(Struct, frozen=True):
    """Metadata that Cohere's clients read."""

    tokens: RerankTokens
    api_version: ApiVersion = ApiVersion()


class RerankReply(Struct, frozen=True):
    """Reply of ``POST /rerank``, most relevant document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: schema.ReplyUsage
    meta: RerankMeta
    object: str = "list"


class Rerank(Task[RerankRequest]):
    """Task ``rerank``."""

    name = "rerank"
    head = "classify"
    truncate = True
    paths = ("/rerank", "/v1/rerank", "/v2/rerank")
    summary = "Sort documents by their relevance to a query."
    request = RerankRequest
    response = RerankReply

    def options(self, request: RerankRequest) -> EncodeOptions:
        return replace(super().options(request), max_pair_tokens=request.max_tokens_per_doc)

    def inputs(self, request: RerankRequest) -> list[Text]:
        schema.check_count(len(request.documents), self.config.max_texts, "documents")
        return [(request.query, _text(document)) for document in request.documents]

    def reply(self, request: RerankRequest, encoded: Encoded) -> RerankReply:
        scores = encoded.rows_by_text(request.aggregate)[:, 0].tolist()
        results = [Ranked(index, score) for index, score in enumerate(scores)]
        if request.windows:
            values = np.asarray(encoded.rows)[:, 0].tolist()
            results = with_windows(results, encoded, values, ScoredWindow)
        results = sorted(results, key=lambda result: -result.relevance_score)[: request.top_n]
        if request.return_documents:
            results = [
                structs.replace(result, document=Document(_text(request.documents[result.index])))
                for result in results
            ]
        meta = RerankMeta(RerankTokens(encoded.num_tokens))
        name, usage = self.config.name, schema.usage(encoded)
        return RerankReply(f"rerank-{uuid4().hex}", name, results, usage, meta)


def _text(document: str | Document) -> str:
    return document if isinstance(document, str) else document.text
