"""``/rerank``: documents by relevance to a query, in the format of Cohere and Jina."""

import time

from msgspec import UNSET, Struct, UnsetType, structs

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import with_windows
from cluster.engines.classifier.serving.tasks.score import ScoredWindow
from cluster.engines.classifier.serving.tasks.scoring import (
    ScoredText,
    ScoredTexts,
    ScoringRequest,
    ScoringTask,
    text_of,
    texts_of,
)


class Document(Struct, frozen=True):
    """A document of the request."""

    text: str


class RerankRequest(ScoringRequest, frozen=True, kw_only=True):
    """Body of ``POST /rerank``.

    Long documents are cut unless ``truncate`` is false or a stride is set, because clients of
    Cohere and Jina do not expect an error.
    """

    query: ScoredText
    documents: ScoredTexts
    top_n: schema.AtLeastZero | None = None
    """Number of documents to return, best first; 0 or null returns all."""
    return_documents: bool = False


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
    created: int
    """Unix time in seconds."""
    object: str = "list"


class Rerank(ScoringTask[RerankRequest]):
    """Task ``rerank``."""

    name = "rerank"
    truncate = True
    paths = ("/rerank", "/v1/rerank", "/v2/rerank")
    summary = "Sort documents by their relevance to a query."
    request = RerankRequest
    response = RerankReply

    def inputs(self, request: RerankRequest) -> list[Text]:
        query, documents = text_of(request.query, "query"), _documents(request)
        schema.check_count(len(documents), self.config.max_texts, "documents")
        return [(query, document) for document in documents]

    def reply(self, request: RerankRequest, encoded: Encoded) -> RerankReply:
        rows, of_windows = request.activate(encoded)
        results = [Ranked(index, score) for index, score in enumerate(rows[:, 0].tolist())]
        if request.windows:
            results = with_windows(results, encoded, of_windows[:, 0].tolist(), ScoredWindow)
        results.sort(key=lambda result: -result.relevance_score)
        results = results[: request.top_n or None]
        if request.return_documents:
            documents = _documents(request)
            results = [
                structs.replace(result, document=Document(documents[result.index]))
                for result in results
            ]
        return RerankReply(
            id=request.reply_id("rerank"),
            created=int(time.time()),
            model=self.config.name,
            results=results,
            usage=schema.usage(encoded),
            meta=RerankMeta(RerankTokens(encoded.num_tokens)),
        )


def _documents(request: RerankRequest) -> list[str]:
    return texts_of(request.documents, "documents")
