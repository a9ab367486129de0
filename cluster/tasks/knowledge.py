"""Requests and results of knowledge bases, ``/v1/knowledge``."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.tasks.requests import GenerativeRequest, TaskRequest
from cluster.tasks.results import Citation, Reply, TaskResult

BaseName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Name of a knowledge base."""
MAX_ID_CHARS = 500
"""Longest id of a document."""
Question = Annotated[str, Field(min_length=1, max_length=10_000, pattern=r"\S")]
Mode = Literal["hybrid", "text", "vector"]
Language = Literal[
    "none", "Arabic", "Danish", "Dutch", "English", "Finnish", "French", "German", "Greek",
    "Hungarian", "Italian", "Norwegian", "Portuguese", "Romanian", "Russian", "Spanish", "Swedish",
    "Tamil", "Turkish",
]  # fmt: skip
MediaType = Literal["text", "markdown", "html", "pdf", "docx"]


class CreateKnowledgeRequest(TaskRequest):
    """Create a knowledge base; an existing one with the same settings is returned."""

    name: BaseName
    """Lower-case letters, digits, `_` and `-`."""
    chunk_tokens: int | None = Field(None, ge=32, le=4096)
    """Maximum number of tokens of a passage. Default: that of the configuration."""
    language: Language = "English"
    """Language of the word search, for word stems and stop words; `none` for other languages."""


class SearchRequest(TaskRequest):
    """Find passages in a knowledge base."""

    query: Question
    limit: int = Field(10, ge=1, le=100)
    """Maximum number of passages."""
    mode: Mode = "hybrid"
    """Search by words (`text`), by meaning (`vector`), or by both (`hybrid`)."""
    rerank: bool = True
    """False to leave out the configured reranker."""


class KnowledgeAnswerRequest(GenerativeRequest):
    """Answer a question from a knowledge base."""

    question: Question
    max_passages: int = Field(6, ge=1, le=50)
    """Maximum number of passages that the model sees."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Relevance of the best passage below which the answer is not in the documents. Default: that
    of the configuration."""
    mode: Mode = "hybrid"
    """Search for the passages, as in `search`."""


class Knowledge(Reply):
    """A knowledge base."""

    name: str
    model: str
    """Classifier that embeds passages and queries."""
    dimensions: int
    """Size of the vectors."""
    chunk_tokens: int
    language: Language
    passages: int | None = None
    """Number of passages; null in lists."""


class KnowledgeList(Reply):
    """Knowledge bases of the tenant, by name."""

    data: list[Knowledge]


class KnowledgeDocument(Reply):
    """A document of a knowledge base."""

    id: str
    type: MediaType
    bytes: int
    """Size of the file."""
    characters: int
    """Length of its text."""
    pages: int | None
    """Number of pages; null if the format has none."""
    passages: int
    sha256: str
    """Hash of the file."""


class DocumentList(Reply):
    """Documents by id."""

    data: list[KnowledgeDocument]
    has_more: bool
    """True if there are more; `after` with the last id continues."""


class Deleted(Reply):
    """A deleted knowledge base or document."""

    id: str
    deleted: Literal[True] = True


class AddResult(TaskResult):
    """Result of adding a document, or of adding it again after a change."""

    document: KnowledgeDocument
    embedded: int
    """Passages that are new or changed."""
    kept: int
    """Passages that were there already."""
    removed: int
    """Passages of the earlier version that are gone."""


class Passage(Reply):
    """Part of a document, from character ``start`` up to but not including ``end`` of its text."""

    document: str
    heading: list[str]
    """Headings above the passage, outermost first."""
    page: int | None
    """Number of the page on which it starts, from 1; null if the format has no pages."""
    start: int
    end: int
    text: str
    similarity: float
    """Cosine similarity of passage and query (-1 to 1)."""
    relevance: float
    """Similarity, or the share of the query's words in the passage if that is higher (0 to 1)."""


class SearchResult(TaskResult):
    """Passages, best first."""

    mode: Mode
    reranked: bool | None = None
    """True if a reranker ordered the passages, false if it failed; null if none was asked."""
    passages: list[Passage]


class KnowledgeCitation(Citation):
    """Passage of a document that the answer refers to."""

    heading: list[str]
    page: int | None


class KnowledgeAnswer(TaskResult):
    """An answer from a knowledge base."""

    answer: str | None
    """The answer; null if it is not in the documents."""
    found: bool
    """False if the answer is not in the documents."""
    relevance: float
    """Relevance of the best passage, which must reach `threshold`."""
    threshold: float
    reranked: bool | None = None
    """True if a reranker ordered the passages, false if it failed; null if none was asked."""
    citations: list[KnowledgeCitation]
    finish_reason: str | None
