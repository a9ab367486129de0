"""``/score``: how well pairs of texts go together; vLLM's format."""

import time
from uuid import uuid4

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import (
    Listing,
    Task,
    WindowedRequest,
    column,
    split_windows,
    usage,
)
from cluster.errors import InvalidRequestError, UnprocessableError

Texts = str | list[str]


class ScoreRequest(WindowedRequest, frozen=True, kw_only=True):
    """The body of ``POST /score``: ``text_1`` and ``text_2``, or ``queries`` and ``documents``."""

    text_1: Texts | UnsetType = UNSET
    text_2: Texts | UnsetType = UNSET
    queries: Texts | UnsetType = UNSET
    documents: Texts | UnsetType = UNSET


class ScoredWindow(Struct, frozen=True, gc=False):
    """The score of the second text's characters from ``start`` up to ``end``."""

    start: int
    end: int
    score: float


class Scored(Struct, frozen=True):
    """The score of one pair."""

    index: int
    score: float
    object: str = "score"
    windows: list[ScoredWindow] | UnsetType = UNSET


class ScoreReply(Listing[Scored], frozen=True, kw_only=True):
    """The answer of ``POST /score``."""

    id: str
    created: int


class ScorePairs(Task[ScoreRequest]):
    """See the module."""

    name = "score"
    head = "classify"
    paths = ("/score", "/v1/score")
    summary = "How well two texts go together: one with one, one with each of many, or in pairs."
    request = ScoreRequest
    response = ScoreReply

    def inputs(self, request: ScoreRequest) -> list[Text]:
        """See ``Task``."""
        first, second = _both(request)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InvalidRequestError(
                f"{len(first)} texts cannot be paired with {len(second)}: give one, or as many",
                param="text_1",
            )
        schema.check_count(len(first), self.config.max_texts, "text_2")
        return list(zip(first, second, strict=True))

    def reply(self, request: ScoreRequest, encoded: Encoded) -> ScoreReply:
        """See ``Task``."""
        scores = column(encoded, request.aggregate)
        data = [Scored(index, score) for index, score in enumerate(scores)]
        if request.windows:
            pairs = zip(data, scored_windows(encoded), strict=True)
            data = [replace(item, windows=windows) for item, windows in pairs]
        return ScoreReply(
            id=f"score-{uuid4().hex}",
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=usage(encoded),
        )


def scored_windows(encoded: Encoded) -> list[list[ScoredWindow]]:
    """For each pair the scores of its windows."""
    scores = [float(row[0]) for row in encoded.rows]
    return [
        [ScoredWindow(window.start, window.end, score) for window, score in windows]
        for windows in split_windows(encoded, scores)
    ]


def _both(request: ScoreRequest) -> tuple[list[str], list[str]]:
    for names in (("text_1", "text_2"), ("queries", "documents")):
        first, second = (getattr(request, name) for name in names)
        if first is not UNSET and second is not UNSET:
            return _list(first), _list(second)
    raise UnprocessableError("text_1 and text_2 are required", param="text_1")


def _list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
