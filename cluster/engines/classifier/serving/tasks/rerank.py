"""``/rerank``: documents by their relevance to a query; the format of Cohere and of Jina."""

from dataclasses import replace
from uuid import uuid4

from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.engines.classifier.serving.tasks.base import (
    ReplyUsage,
    Task,
    WindowedRequest,
    column,
    usage,
)
from cluster.engines.classifier.serving.tasks.score import ScoredWindow, scored_windows


class Document(Struct, frozen=True):
    """A document; further fields are not looked at."""

    text: str


class RerankRequest(WindowedRequest, frozen=True, kw_only=True):
    """The body of ``POST /rerank``.

    Long documents are cut unless ``truncate`` is false or there is a stride: clients of Cohere
    and Jina do not expect to be refused.
    """

    query: str
    documents: list[str | Document]
    top_n: schema.AtLeastOne | None = None
    """How many documents to give, the best first; None: all."""
    return_documents: bool = False
    max_tokens_per_doc: schema.AtLeastOne | None = None
    """Cohere's: what of a document is more is not read."""
    priority: int | None = None
    """Cohere's; not looked at, since a request's class here is its key's or its header's."""


class Ranked(Struct, frozen=True):
    """One document's relevance; ``index`` is its place in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET
    windows: list[ScoredWindow] | UnsetType = UNSET


class RerankTokens(Struct, frozen=True):
    """The tokens, as Cohere writes them."""

    input_tokens: int


class ApiVersion(Struct, frozen=True):
    """Whose format this is: version 2 of Cohere's."""

    version: str = "2"


class RerankMeta(Struct, frozen=True):
    """What Cohere's clients read."""

    tokens: RerankTokens
    api_version: ApiVersion = ApiVersion()


class RerankReply(Struct, frozen=True):
    """The answer of ``POST /rerank``, the most relevant document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: ReplyUsage
    meta: RerankMeta
    object: str = "list"


class Rerank(Task[RerankRequest]):
    """See the module."""

    name = "rerank"
    head = "classify"
    truncate = True
    paths = ("/rerank", "/v1/rerank", "/v2/rerank")
    summary = "Documents by their relevance to a query."
    request = RerankRequest
    response = RerankReply

    def how(self, request: RerankRequest) -> EncodeOptions:
        """See ``Task``."""
        return replace(super().how(request), max_pair_tokens=request.max_tokens_per_doc)

    def inputs(self, request: RerankRequest) -> list[Text]:
        """See ``Task``."""
        schema.check_count(len(request.documents), self.config.max_texts, "documents")
        return [(request.query, _text(document)) for document in request.documents]

    def reply(self, request: RerankRequest, encoded: Encoded) -> RerankReply:
        """See ``Task``."""
        scores = column(encoded, request.aggregate)
        windows = scored_windows(encoded) if request.windows else [UNSET] * len(scores)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
        results = [
            Ranked(index, scores[index], self._document(request, index), windows[index])
            for index in order
        ]
        spent = usage(encoded)
        meta = RerankMeta(RerankTokens(spent.total_tokens))
        name = self.config.name
        return RerankReply(f"rerank-{uuid4().hex}", name, results, spent, meta)

    def _document(self, request: RerankRequest, index: int) -> Document | UnsetType:
        return Document(_text(request.documents[index])) if request.return_documents else UNSET


def _text(document: str | Document) -> str:
    return document if isinstance(document, str) else document.text
