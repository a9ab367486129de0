"""``/score``: similarity or relevance of pairs of texts, in vLLM's format."""

import time
from uuid import uuid4

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.errors import InvalidRequestError, UnprocessableError

TextOrList = str | list[str]


class ScoreRequest(schema.WindowedRequest, frozen=True, kw_only=True):
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


class ScoreReply(schema.ListReply[Scored], frozen=True, kw_only=True):
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
        first, second = _both(request)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            message = (
                f"text_1 has {len(first)} texts and text_2 has {len(second)}; text_1 must have one "
                "text or as many as text_2"
            )
            raise InvalidRequestError(message, param="text_1")
        schema.check_count(len(first), self.config.max_texts, "text_2")
        return list(zip(first, second, strict=True))

    def reply(self, request: ScoreRequest, encoded: Encoded) -> ScoreReply:
        scores = encoded.rows_by_text(request.aggregate)[:, 0].tolist()
        data = [Scored(index, score) for index, score in enumerate(scores)]
        if request.windows:
            values = np.asarray(encoded.rows)[:, 0].tolist()
            data = with_windows(data, encoded, values, ScoredWindow)
        return ScoreReply(
            id=f"score-{uuid4().hex}",
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )


def _both(request: ScoreRequest) -> tuple[list[str], list[str]]:
    for names in (("text_1", "text_2"), ("queries", "documents")):
        values = [getattr(request, name) for name in names]
        if UNSET not in values:
            first, second = ([texts] if isinstance(texts, str) else texts for texts in values)
            return first, second
    raise UnprocessableError("text_1 and text_2 are required", param="text_1")
