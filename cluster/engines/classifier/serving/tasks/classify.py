"""``/classify``: the labels of texts or of pairs of texts, the best first."""

from collections.abc import Sequence

import numpy as np
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from cluster.engines.classifier.explain.schema import MAX_TEXTS, ExplainOptions, Explanation
from cluster.engines.classifier.model.types import Rows, Text
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import (
    Listing,
    Task,
    WindowedRequest,
    split_windows,
    usage,
)
from cluster.engines.classifier.serving.texts import ItemOrList, to_texts
from cluster.errors import InvalidRequestError


class ClassifyRequest(WindowedRequest, frozen=True, kw_only=True):
    """The body of ``POST /classify``."""

    input: ItemOrList
    top_k: schema.AtLeastOne | None = None
    """How many labels to give for each text; None: all."""
    explain: bool | ExplainOptions = False
    """Say why: what each word adds to the score of each label that is given."""


class Score(Struct, frozen=True, gc=False):
    """A label and how strongly it holds."""

    label: str
    score: float


class ClassifiedWindow(Struct, frozen=True):
    """The labels of the characters from ``start`` up to ``end``."""

    start: int
    end: int
    label: str
    score: float
    scores: list[Score]


class Classified(Struct, frozen=True):
    """One text's labels, the best first."""

    index: int
    label: str
    score: float
    scores: list[Score]
    windows: list[ClassifiedWindow] | UnsetType = UNSET
    explanation: Explanation | UnsetType = UNSET


class ClassifyReply(Listing[Classified], frozen=True, kw_only=True):
    """The answer of ``POST /classify``."""


class Classify(Task[ClassifyRequest]):
    """See the module."""

    name = "classify"
    head = "classify"
    paths = ("/classify",)
    summary = "The labels of a text, or of each of a list."
    request = ClassifyRequest
    response = ClassifyReply

    def inputs(self, request: ClassifyRequest) -> list[Text]:
        """See ``Task``."""
        texts = to_texts(request.input)
        most = MAX_TEXTS if request.explain else self.config.max_texts
        schema.check_count(len(texts), min(most, self.config.max_texts))
        if request.explain and request.stride is not None:
            raise InvalidRequestError("explain and stride exclude each other", param="explain")
        return texts

    def reply(self, request: ClassifyRequest, encoded: Encoded) -> ClassifyReply:
        """See ``Task``."""
        scores = best(encoded.rows_by_text(request.aggregate), self.model.labels, request.top_k)
        data = [Classified(i, row[0].label, row[0].score, row) for i, row in enumerate(scores)]
        if request.windows:
            pairs = zip(data, self._windows(request, encoded), strict=True)
            data = [replace(item, windows=windows) for item, windows in pairs]
        return ClassifyReply(data=data, model=self.config.name, usage=usage(encoded))

    def _windows(self, request: ClassifyRequest, encoded: Encoded) -> list[list[ClassifiedWindow]]:
        scores = best(np.asarray(encoded.rows), self.model.labels, request.top_k)
        return [
            [
                ClassifiedWindow(window.start, window.end, row[0].label, row[0].score, row)
                for window, row in windows
            ]
            for windows in split_windows(encoded, scores)
        ]


def best(rows: Rows, labels: Sequence[str], top_k: int | None) -> list[list[Score]]:
    """Each row's ``top_k`` labels, the best first; equal ones in the model's order."""
    order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(rows, order, axis=1)
    return [
        [Score(labels[column], value) for column, value in zip(columns, scores, strict=True)]
        for columns, scores in zip(order.tolist(), values.tolist(), strict=True)
    ]
