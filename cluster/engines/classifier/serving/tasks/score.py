"""``/score``: similarity or relevance of pairs of texts, in vLLM's format."""

import time
from uuid import uuid4

from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import (
    ListReply,
    Task,
    WindowedRequest,
    first_column,
    split_windows,
    usage,
    with_windows,
)
from cluster.errors import InvalidRequestError, UnprocessableError

TextOrList = str | list[str]


class ScoreRequest(WindowedRequest, frozen=True, kw_only=True):
    """Body of ``POST /score``: ``text_1`` and ``text_2``, or ``queries`` and ``documents``."""

    text_1: TextOrList | UnsetType = UNSET
    text_2: TextOrList | UnsetType = UNSET
    queries: TextOrList | UnsetType = UNSET
    documents: TextOrList | UnsetType = UNSET


class ScoredWindow(Struct, frozen=True, gc=False):
    """Score of the second text's characters from ``start`` up to ``end``."""

    start: int
    end: int
    score: float


class Scored(Struct, frozen=True):
    """Score of one pair."""

    index: int
    score: float
    object: str = "score"
    windows: list[ScoredWindow] | UnsetType = UNSET


class ScoreReply(ListReply[Scored], frozen=True, kw_only=True):
    """Reply of ``POST /score``."""

    id: str
    created: int


class ScorePairs(Task[ScoreRequest]):
    """Task ``score``."""

    name = "score"
    head = "classify"
    paths = ("/score", "/v1/score")
    summary = "Score pairs of texts: one with one, one with each of many, or two lists."
    request = ScoreRequest
    response = ScoreReply

    def inputs(self, request: ScoreRequest) -> list[Text]:
        """Return the pairs; see ``Task``."""
        first, second = _both(request)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InvalidRequestError(
                f"text_1 has {len(first)} texts and text_2 has {len(second)}; text_1 must have one "
                "text or as many as text_2",
                param="text_1",
            )
        schema.check_count(len(first), self.config.max_texts, "text_2")
        return list(zip(first, second, strict=True))

    def reply(self, request: ScoreRequest, encoded: Encoded) -> ScoreReply:
        """Return the score of each pair; see ``Task``."""
        scores = first_column(encoded, request.aggregate)
        data = [Scored(index, score) for index, score in enumerate(scores)]
        if request.windows:
            data = with_windows(data, scored_windows(encoded))
        return ScoreReply(
            id=f"score-{uuid4().hex}",
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=usage(encoded),
        )


def scored_windows(encoded: Encoded) -> list[list[ScoredWindow]]:
    """Return the scores of each pair's windows."""
    scores = [float(row[0]) for row in encoded.rows]
    return [
        [ScoredWindow(window.start, window.end, score) for window, score in windows]
        for windows in split_windows(encoded, scores)
    ]


def _both(request: ScoreRequest) -> tuple[list[str], list[str]]:
    for names in (("text_1", "text_2"), ("queries", "documents")):
        first, second = (getattr(request, name) for name in names)
        if first is not UNSET and second is not UNSET:
            return _to_list(first), _to_list(second)
    raise UnprocessableError("text_1 and text_2 are required", param="text_1")


def _to_list(texts: TextOrList) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
