"""Sparse vectors of texts by a SPLADE model: weights of the vocabulary's tokens."""

from typing import Any

from msgspec import Struct

from cluster.engines.classifier.model.types import ModelInput
from cluster.engines.classifier.serving.inputs import InputRequest, read_inputs
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task

MAX_SPARSE_TEXTS = 512
"""Texts of a request; a text has at most as many terms as the vocabulary has tokens."""


class SparseRequest(InputRequest, frozen=True, kw_only=True):
    """Texts whose sparse vectors are wanted."""


class Term(Struct, frozen=True, gc=False):
    """A token id and its weight, log(1 + ReLU(largest logit over the text))."""

    index: int
    value: float


class EmbedSparse(Task[SparseRequest]):
    """Task ``embed-sparse``."""

    name = "embed-sparse"
    head = "embed-sparse"
    paths = ()
    summary = "Compute the sparse vector of one or more texts."
    request = SparseRequest
    response = list[list[Term]]

    def inputs(self, request: SparseRequest) -> list[ModelInput]:
        return read_inputs(request, self.model, min(MAX_SPARSE_TEXTS, self.config.max_texts))

    def reply(self, request: SparseRequest, encoded: Encoded) -> Any:
        return [[Term(int(index), value) for index, value in row.tolist()] for row in encoded.rows]
