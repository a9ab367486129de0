"""``/classify``: labels of texts or of pairs of texts, best first."""

import time
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.explain.schema import MAX_TEXTS, ExplainOptions, Explanation
from cluster.engines.classifier.model.types import Head, ModelInput, Rows
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.inputs import InputRequest, read_inputs
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.errors import InvalidRequestError


class ClassifyRequest(InputRequest, frozen=True, kw_only=True):
    """Body of ``POST /classify``."""

    top_k: schema.AtLeastOne | None = None
    """Number of labels in ``scores`` of each text; null returns all."""
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
    """Labels of one text, best first; ``probs`` has the scores in the order of the model."""

    index: int
    label: str
    score: float
    scores: list[Score]
    probs: list[float]
    num_classes: int
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

    def head_for(self, request: ClassifyRequest) -> Head:
        return "classify" if request.activation_choice in (None, True) else "logits"

    def inputs(self, request: ClassifyRequest) -> list[ModelInput]:
        limit = self.config.max_texts
        if not request.explain:
            return read_inputs(request, self.model, limit)
        inputs = read_inputs(request, self.model, min(MAX_TEXTS, limit))
        if request.stride is not None:
            raise InvalidRequestError("explain and stride exclude each other", param="explain")
        if self.options(request).tokenization or self.head_for(request) != "classify":
            message = "explain takes the model's usual tokens and activation"
            raise InvalidRequestError(message, param="explain")
        if not all(isinstance(item, (str, tuple)) for item in inputs):
            raise InvalidRequestError("explain needs texts, not token ids", param="explain")
        return inputs

    def reply(self, request: ClassifyRequest, encoded: Encoded) -> ClassifyReply:
        rows, of_windows = request.activate(encoded)
        labels, top_k = self.model.labels, request.top_k
        data = [
            Classified(index, scores[0].label, scores[0].score, scores, probs, len(probs))
            for index, (scores, probs) in enumerate(
                zip(best(rows, labels, top_k), rows.tolist(), strict=True)
            )
        ]
        if request.windows:
            data = with_windows(data, encoded, best(of_windows, labels, top_k), _window)
        return ClassifyReply(
            id=request.reply_id("classify"),
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )


def _window(start: int, end: int, scores: list[Score]) -> ClassifiedWindow:
    return ClassifiedWindow(start, end, scores[0].label, scores[0].score, scores)


def best(rows: Rows, labels: Sequence[str], top_k: int | None) -> list[list[Score]]:
    """Return the ``top_k`` best labels of each row; ties keep the model's order."""
    order = (-rows).argsort(axis=1, kind="stable")[:, :top_k].tolist()
    return [
        [Score(labels[column], scores[column]) for column in columns]
        for columns, scores in zip(order, rows.tolist(), strict=True)
    ]
