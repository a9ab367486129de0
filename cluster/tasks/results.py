"""Bodies of answers; attribute docstrings become descriptions in OpenAPI."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base of results."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class TaskUsage(Reply):
    """Tokens of all calls to models that a task made."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved from being computed."""
    calls: int = 0
    """Calls to models, without those that count tokens."""


class TaskResult(Reply):
    """Fields of every result."""

    id: str
    """Id of the request."""
    task: str
    model: str
    """Model that the request named, or the default."""
    usage: TaskUsage


class Reference(Reply):
    """A part of the source text, from character ``start`` up to but not including ``end``."""

    start: int
    end: int
    score: float
    """Share of the sentence's words that the part has, weighted by their rarity (0 to 1)."""


class Chunk(Reply):
    """Part of the source text that was summarized in one call."""

    start: int
    end: int
    tokens: int


class SummarySentence(Reply):
    """Sentence of a summary and its sources."""

    text: str
    references: list[Reference]


class SummarizeResult(TaskResult):
    """A summary."""

    summary: str
    finish_reason: str | None
    """`stop`, or `length` if `max_tokens` ended it."""
    chunks: list[Chunk]
    sentences: list[SummarySentence] | None = None
    """Sentences with their sources, if `references` is true."""


class TranslateResult(TaskResult):
    """A translation."""

    translation: str
    source: str
    """BCP 47 tag of the source language, as given or detected."""
    detected: bool
    """True if the source language was detected."""
    target: str
    segments: int
    """Number of paragraphs, list items, cells and headings that were translated."""
    missing_terms: list[str]
    """Terms of the glossary that occur in the text, but whose translation does not occur in the
    result."""
    truncated: bool
    """True if `max_tokens` ended a paragraph."""


class Citation(Reply):
    """Passage of a document that the answer refers to."""

    number: int
    """Number of the passage, `[number]` in the answer."""
    document: str
    """Id of the document, or its position in the list."""
    start: int
    end: int
    text: str
    score: float
    """Relevance of the passage to the question (0 to 1)."""


class AnswerResult(TaskResult):
    """An answer from documents."""

    answer: str | None
    """The answer; null if it is not in the documents."""
    found: bool
    """False if the answer is not in the documents."""
    relevance: float
    """Relevance of the best passage, which must reach `threshold`."""
    citations: list[Citation]
    finish_reason: str | None


class LabelScore(Reply):
    """A label and its score (0 to 1)."""

    label: str
    score: float


class LabeledText(Reply):
    """Labels of one text, best first."""

    label: str
    score: float
    scores: list[LabelScore]


class TextSentiment(LabeledText):
    """Sentiment of one text."""

    aspects: dict[str, str]
    """`positive`, `negative`, `neutral` or `absent`, by aspect."""


class SentimentResult(TaskResult):
    """Sentiments of texts, in order."""

    results: list[TextSentiment]


class ClassifyResult(TaskResult):
    """Labels of texts, in order."""

    method: str
    results: list[LabeledText]


class Span(Reply):
    """Position of an extracted value in the text."""

    path: str
    """JSON pointer of the value."""
    start: int
    end: int


class ExtractResult(TaskResult):
    """Data from a text."""

    data: dict[str, Any]
    """The data, valid by the schema."""
    spans: list[Span]
    """Positions of the values that the text contains literally, up to case and white space."""
    not_found: list[str]
    """JSON pointers of the texts and numbers that it does not contain."""
