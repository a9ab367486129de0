"""``/score``: similarity or relevance of pairs of texts, in vLLM's format."""

import time

from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.model.types import Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import with_windows
from cluster.engines.classifier.serving.tasks.scoring import (
    ScoredTexts,
    ScoringRequest,
    ScoringTask,
    texts_of,
)
from cluster.errors import InvalidRequestError

_NAMES = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)
"""Names of the first and second texts, those of vLLM."""


class ScoreRequest(ScoringRequest, frozen=True, kw_only=True):
    """Body of ``POST /score``: ``text_1`` and ``text_2``, or one of the other pairs of names."""

    text_1: ScoredTexts | UnsetType = UNSET
    text_2: ScoredTexts | UnsetType = UNSET
    queries: ScoredTexts | UnsetType = UNSET
    documents: ScoredTexts | UnsetType = UNSET
    items: ScoredTexts | UnsetType = UNSET
    data_1: ScoredTexts | UnsetType = UNSET
    data_2: ScoredTexts | UnsetType = UNSET


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


class ScorePairs(ScoringTask[ScoreRequest]):
    """Task ``score``."""

    name = "score"
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
        rows, of_windows = request.activate(encoded)
        data = [Scored(index, score) for index, score in enumerate(rows[:, 0].tolist())]
        if request.windows:
            data = with_windows(data, encoded, of_windows[:, 0].tolist(), ScoredWindow)
        return ScoreReply(
            id=request.reply_id("score"),
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )


def _both(request: ScoreRequest) -> tuple[list[str], list[str]]:
    for names in _NAMES:
        values = {name: getattr(request, name) for name in names}
        if UNSET not in values.values():
            first, second = (texts_of(texts, name) for name, texts in values.items())
            return first, second
    raise InvalidRequestError("text_1 and text_2 are required", param="text_1")
