"""``/token-classification``, also ``/ner``: the entities of texts, with their characters."""

from msgspec import Struct

from cluster.engines.classifier.model.types import Rows
from cluster.engines.classifier.model.windows import Merge, Window, merge_spans, merge_tokens
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.spans import Strategy, Tokens, find_spans
from cluster.engines.classifier.serving.tasks.base import (
    Listing,
    LongRequest,
    Task,
    split_windows,
    usage,
)


class TokenClassificationRequest(LongRequest, frozen=True, kw_only=True):
    """The body of ``POST /token-classification``."""

    input: str | list[str]
    aggregation_strategy: Strategy = "simple"
    """How tokens make entities; the names are those of transformers' pipeline."""


class Entity(Struct, frozen=True, gc=False):
    """What stands from the character ``start`` up to ``end``."""

    label: str
    score: float
    text: str
    start: int
    end: int


class Labelled(Struct, frozen=True):
    """The entities of one text, in order."""

    index: int
    entities: list[Entity]


class TokenClassificationReply(Listing[Labelled], frozen=True, kw_only=True):
    """The answer of ``POST /token-classification``."""


class TokenClassification(Task[TokenClassificationRequest]):
    """See the module."""

    name = "token-classification"
    head = "token-classification"
    with_offsets = True
    paths = ("/token-classification", "/ner")
    summary = "The entities in a text, or in each of a list."
    request = TokenClassificationRequest
    response = TokenClassificationReply

    def inputs(self, request: TokenClassificationRequest) -> list[str]:
        """See ``Task``."""
        return schema.texts_of(request.input, self.config.max_texts)

    def reply(
        self, request: TokenClassificationRequest, encoded: Encoded
    ) -> TokenClassificationReply:
        """See ``Task``."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        windows = split_windows(encoded, list(encoded.rows))
        data = [
            Labelled(index, self._entities(text, parts, request))
            for index, (text, parts) in enumerate(zip(texts, windows, strict=True))
        ]
        return TokenClassificationReply(data=data, model=self.config.name, usage=usage(encoded))

    def _entities(
        self, text: str, parts: list[tuple[Window, Rows]], request: TokenClassificationRequest
    ) -> list[Entity]:
        tokens = _tokens(parts, request.aggregate)
        return [
            Entity(span.label, span.score, text[span.start : span.end], span.start, span.end)
            for span in find_spans(tokens, self.model.labels, request.aggregation_strategy)
        ]


def _tokens(parts: list[tuple[Window, Rows]], how: Merge) -> Tokens:
    windows = [window for window, _ in parts]
    scores = merge_tokens([rows for _, rows in parts], windows, how)
    spans, continues = merge_spans(windows)
    return Tokens(scores, spans, continues)
