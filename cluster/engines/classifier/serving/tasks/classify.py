"""``/classify``: labels of texts or of pairs of texts, best first."""

from collections.abc import Sequence

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.explain.schema import MAX_TEXTS, ExplainOptions, Explanation
from cluster.engines.classifier.model.types import Rows, Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.errors import InvalidRequestError


class ClassifyRequest(schema.WindowedRequest, frozen=True, kw_only=True):
    """Body of ``POST /classify``."""

    input: schema.ItemOrList
    top_k: schema.AtLeastOne | None = None
    """Number of labels per text; null returns all."""
    explain: bool | ExplainOptions = False
    """True or options to return each word's contribution to each returned label's score."""


class Score(Struct, frozen=True, gc=False):
    """A label and its score."""

    label: str
    score: float


class ClassifiedWindow(Struct, frozen=True):
    """Labels of the characters from ``start`` up to ``end``."""

    start: int
    end: int
    label: str
    score: float
    scores: list[Score]


class Classified(Struct, frozen=True):
    """Labels of one text, best first."""

    index: int
    label: str
    score: float
    scores: list[Score]
    windows: list[ClassifiedWindow] | UnsetType = UNSET
    explanation: Explanation | UnsetType = UNSET


class ClassifyReply(schema.ListReply[Classified], frozen=True, kw_only=True):
    """Reply of ``POST /classify``."""


class Classify(Task[ClassifyRequest]):
    """Task ``classify``."""

    name = "classify"
    head = "classify"
    paths = ("/classify",)
    summary = "Classify one or more texts."
    request = ClassifyRequest
    response = ClassifyReply

    def inputs(self, request: ClassifyRequest) -> list[Text]:
        texts = schema.to_texts(request.input)
        limit = self.config.max_texts
        schema.check_count(len(texts), min(MAX_TEXTS, limit) if request.explain else limit)
        if request.explain and request.stride is not None:
            raise InvalidRequestError("explain and stride exclude each other", param="explain")
        return texts

    def reply(self, request: ClassifyRequest, encoded: Encoded) -> ClassifyReply:
        scores = best(encoded.rows_by_text(request.aggregate), self.model.labels, request.top_k)
        data = [Classified(i, row[0].label, row[0].score, row) for i, row in enumerate(scores)]
        if request.windows:
            rows = best(np.asarray(encoded.rows), self.model.labels, request.top_k)
            data = with_windows(data, encoded, rows, _window)
        return ClassifyReply(data=data, model=self.config.name, usage=schema.usage(encoded))


def _window(start: int, end: int, scores: list[Score]) -> ClassifiedWindow:
    return ClassifiedWindow(start, end, scores[0].label, scores[0].score, scores)


def best(rows: Rows, labels: Sequence[str], top_k: int | None) -> list[list[Score]]:
    """Return the ``top_k`` best labels of each row; ties keep the model's order."""
    order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(rows, order, axis=1)
    return [
        [Score(labels[column], value) for column, value in zip(columns, scores, strict=True)]
        for columns, scores in zip(order.tolist(), values.tolist(), strict=True)
    ]
