"""``/classify``: the labels of texts, the best first."""

from collections.abc import Sequence

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from cluster.engines.encoder import schema
from cluster.engines.encoder.explain_schema import MAX_TEXTS, ExplainOptions, Explanation
from cluster.engines.encoder.jobs import Encoded, Rows
from cluster.engines.encoder.tasks.base import Listing, Request, Task, usage


class ClassifyRequest(Request, frozen=True, kw_only=True):
    """The body of ``POST /classify``."""

    input: str | list[str]
    top_k: schema.AtLeastOne | None = None
    """How many labels to give for each text; None: all."""
    explain: bool | ExplainOptions = False
    """Say why: what each word adds to the score of each label that is given."""


class Score(Struct, frozen=True, gc=False):
    """A label and how strongly it holds."""

    label: str
    score: float


class Classified(Struct, frozen=True):
    """One text's labels, the best first."""

    index: int
    label: str
    score: float
    scores: list[Score]
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

    def inputs(self, request: ClassifyRequest) -> list[str]:
        """See ``Task``."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        most = MAX_TEXTS if request.explain else self.config.max_texts
        schema.check_count(len(texts), min(most, self.config.max_texts))
        return texts

    def reply(self, request: ClassifyRequest, encoded: Encoded) -> ClassifyReply:
        """See ``Task``."""
        scores = best(encoded.rows, self.model.labels, request.top_k)
        data = [Classified(i, row[0].label, row[0].score, row) for i, row in enumerate(scores)]
        return ClassifyReply(data=data, model=self.config.name, usage=usage(encoded))


def best(rows: Rows, labels: Sequence[str], top_k: int | None) -> list[list[Score]]:
    """Each row's ``top_k`` labels, the best first; equal ones in the model's order."""
    order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(rows, order, axis=1)
    return [
        [Score(labels[column], value) for column, value in zip(columns, scores, strict=True)]
        for columns, scores in zip(order.tolist(), values.tolist(), strict=True)
    ]
