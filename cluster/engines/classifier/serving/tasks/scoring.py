"""Fields and texts of requests that score pairs of texts: ``/score`` and ``/rerank``."""

from typing import Any

from msgspec import Struct

from cluster.engines.classifier.model.types import Head, Tokenization
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.inputs import ContentPart
from cluster.engines.classifier.serving.tasks.base import RequestT, Task
from cluster.errors import InvalidRequestError


class TextContent(Struct, frozen=True):
    """A text; other fields are ignored, such as those of a document in a database."""

    text: str | None = None
    content: list[ContentPart] | None = None
    """Parts of the text, in vLLM's form."""


ScoredText = str | TextContent
ScoredTexts = ScoredText | list[ScoredText]


class ScoringRequest(schema.WindowedRequest, frozen=True, kw_only=True):
    """Fields of requests that score pairs."""

    max_tokens_per_query: schema.AtLeastZero | None = None
    """Number of tokens read of each first text; 0 or null reads as many as fit."""
    max_tokens_per_doc: schema.AtLeastZero | None = None
    """Number of tokens read of each second text; 0 or null reads as many as fit."""
    instruction: str | None = None
    """No effect: cross-encoders have no template for it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """No effect: cross-encoders have no chat template."""


class ScoringTask(Task[RequestT]):
    """Task that scores pairs of texts."""

    head = "classify"

    def head_for(self, request: RequestT) -> Head:
        assert isinstance(request, schema.WindowedRequest)
        return "classify" if request.activation_choice in (None, True) else "logits"

    def tokenization(self, request: RequestT) -> Tokenization | None:
        assert isinstance(request, ScoringRequest)
        usual = super().tokenization(request)
        first, second = request.max_tokens_per_query, request.max_tokens_per_doc
        if not first and not second:
            return usual
        return Tokenization(usual.max_tokens if usual else None, first or None, second or None)


def text_of(value: ScoredText, param: str) -> str:
    """Return the text of a value; raise ``InvalidRequestError`` if it has none."""
    if isinstance(value, str):
        return value
    if value.text is not None:
        return value.text
    parts = [part.text for part in value.content or ()]
    if not parts or None in parts:
        raise InvalidRequestError(f"{param}: an object needs the field `text`", param=param)
    return "".join(part for part in parts if part is not None)


def texts_of(value: ScoredTexts, param: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [text_of(item, param) for item in items]
