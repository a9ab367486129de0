"""Bodies of requests; attribute docstrings become descriptions in OpenAPI."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
"""Text that is not blank."""
Name = Annotated[str, Field(min_length=1, max_length=200)]
LanguageTag = Annotated[
    str,
    Field(
        max_length=35,
        # RFC 5646, 2.1: language (and extended ones), script, region, variants, extensions.
        pattern=r"^[A-Za-z]{2,3}(-[A-Za-z]{3}){0,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|[0-9]{3}))?"
        r"(-([A-Za-z0-9]{5,8}|[0-9][A-Za-z0-9]{3}))*"
        r"(-[0-9A-WY-Za-wy-z](-[A-Za-z0-9]{2,8})+)*(-[Xx](-[A-Za-z0-9]{1,8})+)?$",
    ),
]
"""BCP 47 tag such as `de`, `pt-BR` or `zh-Hant`."""
MAX_EXAMPLES = 32


class TaskRequest(BaseModel):
    """Fields of every task's request."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    model: Name | None = None
    """Model to use. Default: that of the configuration."""


class Example(BaseModel):
    """An input and the output that the model should give for it (few-shot)."""

    model_config = TaskRequest.model_config

    input: Text
    output: Text


class GenerativeRequest(TaskRequest):
    """Fields of tasks that generate text."""

    stream: bool = False
    """True to get the text as server-sent events while it is generated."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Sampling temperature."""
    max_tokens: int | None = Field(None, ge=1, le=32_768)
    """Maximum number of tokens of each generated text. Default: chosen by the task."""
    examples: list[Example] = Field([], max_length=MAX_EXAMPLES)
    """Examples, which the model sees before the text."""


class SummarizeRequest(GenerativeRequest):
    """Summarize a text of any length."""

    text: Text
    length: Literal["short", "medium", "long"] = "medium"
    """One or two sentences, one paragraph, or several."""
    style: Literal["paragraph", "bullets", "headline"] = "paragraph"
    language: LanguageTag | None = None
    """Language of the summary. Default: that of the text."""
    references: bool = False
    """True to return, for each sentence of the summary, the sentences of the text that share most
    of its words."""


class TranslateRequest(GenerativeRequest):
    """Translate a text, paragraph by paragraph."""

    text: Text
    target: LanguageTag
    """Language to translate to."""
    source: LanguageTag | None = None
    """Language of the text. Default: detected."""
    glossary: dict[Name, Name] = Field({}, max_length=500)
    """Terms and their translations."""
    formality: Literal["default", "formal", "informal"] = "default"
    format: Literal["text", "markdown"] = "text"
    """`markdown` keeps headings, lists, tables, code, front matter and link targets as they are."""


class Document(BaseModel):
    """A document to answer from."""

    model_config = TaskRequest.model_config

    text: Text
    id: Name | None = None
    """Name in citations. Default: the position in the list."""


class AnswerRequest(GenerativeRequest):
    """Answer a question from the given documents."""

    question: Annotated[str, Field(min_length=1, max_length=10_000, pattern=r"\S")]
    documents: list[Document] = Field(min_length=1, max_length=1000)
    max_passages: int = Field(8, ge=1, le=100)
    """Maximum number of passages that the model sees."""
    threshold: float = Field(0.3, ge=0, le=1)
    """Relevance of the best passage below which the answer is not in the documents: the share of
    the question's words that the passage has, weighted by their rarity (0 to 1)."""


class SentimentRequest(TaskRequest):
    """Find the sentiment of texts, and of aspects of them."""

    texts: list[Text] = Field(min_length=1, max_length=1000)
    aspects: list[Name] = Field([], max_length=16)
    """Aspects, such as `price`, whose sentiment a generator finds in each text."""
    generator: Name | None = None
    """Generator for the aspects. Default: that of the configuration."""


class ExtractExample(BaseModel):
    """A text and the data in it (few-shot)."""

    model_config = TaskRequest.model_config

    input: Text
    output: dict[str, Any]


class ExtractRequest(TaskRequest):
    """Extract data from a text by a JSON schema."""

    text: Text
    json_schema: dict[str, Any] = Field(min_length=1)
    """JSON schema (2020-12) of the data, an object; references must be local."""
    instructions: str = Field("", max_length=4000)
    """Further instructions for the model."""
    temperature: float = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(1024, ge=1, le=32_768)
    """Maximum number of tokens of the data."""
    examples: list[ExtractExample] = Field([], max_length=MAX_EXAMPLES)


class ClassifyRequest(TaskRequest):
    """Classify texts by labels that need no training."""

    texts: list[Text] = Field(min_length=1, max_length=256)
    labels: list[Name] = Field(min_length=2, max_length=64)
    method: Literal["generator", "encoder"] = "generator"
    """Calibrated log-probabilities of the labels in a generator, or the similarity of text and
    label in the embeddings of a classifier."""
    examples: list[Example] = Field([], max_length=MAX_EXAMPLES)
    """Texts and their labels; for the method `generator`."""
