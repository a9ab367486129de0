"""Vectors of texts or token ids: ``/v1/embeddings``, and the similarity and tokens of texts."""

import time
from typing import Any, Literal

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.model.types import Head, ModelInput, Rows
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.inputs import read_inputs
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.engines.classifier.serving.vectors import (
    BinaryReply,
    VectorRequest,
    check_format,
    to_binary,
    to_json,
)
from cluster.errors import InvalidRequestError

MAX_TOKEN_TEXTS = 32
"""Texts of a request for the vectors of all tokens, which take up to 1.5 MB for each text."""


class EmbeddingsRequest(VectorRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/embeddings``: OpenAI's and vLLM's fields, and those for long texts."""

    dimensions: schema.AtLeastOne | None = None
    """Number of values to keep of each vector, which is then normalized again."""
    normalize: bool | None = None
    """Former name of ``use_activation``: true for unit length, false for vectors as pooled.
    Default: the model's own."""
    modality: Literal["text"] = "text"
    """Kind of input, in Infinity's requests."""

    @property
    def unit_length(self) -> bool | None:
        """Requested normalization; None is the model's own."""
        choice = self.activation_choice
        if choice is None:
            return self.normalize
        return choice if isinstance(choice, bool) else choice != "none"


class EmbeddedWindow(Struct, frozen=True):
    """Vector of the characters from ``start`` up to ``end``."""

    start: int
    end: int
    embedding: list[float] | str


class Embedding(Struct, frozen=True):
    """Vector of one text; a string is base64 of its values."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"
    windows: list[EmbeddedWindow] | UnsetType = UNSET


class EmbeddingsReply(schema.ListReply[Embedding], frozen=True, kw_only=True):
    """Reply of ``POST /v1/embeddings``."""


class Embed(Task[EmbeddingsRequest]):
    """Task ``embed``."""

    name = "embed"
    head = "embed"
    paths = ("/v1/embeddings", "/embeddings")
    summary = "Compute the embedding of one or more texts."
    request = EmbeddingsRequest
    response = EmbeddingsReply

    def head_for(self, request: EmbeddingsRequest) -> Head:
        return "embed-unnormalized" if request.unit_length is False else "embed"

    def inputs(self, request: EmbeddingsRequest) -> list[ModelInput]:
        width = self.model.embedding_size
        if request.dimensions and request.dimensions > width:
            message = f"dimensions is {request.dimensions}; the model has {width}"
            raise InvalidRequestError(message, param="dimensions")
        if request.windows and request.is_binary:
            message = f"encoding_format `{request.encoding_format}` has no windows"
            raise InvalidRequestError(message, param="encoding_format")
        inputs = read_inputs(request, self.model, self.config.max_texts)
        check_format(request, len(inputs))
        return inputs

    def reply(self, request: EmbeddingsRequest, encoded: Encoded) -> EmbeddingsReply | BinaryReply:
        rows = encoded.rows_by_text(request.aggregate)
        if encoded.windows and self._normalizes(request):
            rows = to_unit(rows)
        rows = self._finish(request, rows)
        reply_id, created = request.reply_id("embd"), int(time.time())
        name, usage = self.config.name, schema.usage(encoded)
        if request.is_binary:
            return to_binary(request, rows, reply_id, created, name, usage)
        data = [Embedding(index, vector) for index, vector in enumerate(to_json(request, rows))]
        if request.windows:
            vectors = to_json(request, self._finish(request, np.asarray(encoded.rows)))
            data = with_windows(data, encoded, vectors, EmbeddedWindow)
        return EmbeddingsReply(id=reply_id, created=created, data=data, model=name, usage=usage)

    def _normalizes(self, request: EmbeddingsRequest) -> bool:
        unit_length = request.unit_length
        return self.model.pooling.normalize if unit_length is None else unit_length

    def _finish(self, request: EmbeddingsRequest, rows: Rows) -> Rows:
        is_cut = request.dimensions is not None and request.dimensions < rows.shape[1]
        rows = rows[:, : request.dimensions]
        is_unit = self.model.pooling.normalize and not is_cut
        return to_unit(rows) if self._normalizes(request) and not is_unit else rows


class SimilarityRequest(schema.TaskRequest, frozen=True, kw_only=True):
    """A sentence and those to compare it with."""

    source_sentence: str
    sentences: list[str]


class Similarity(Task[SimilarityRequest]):
    """Cosine similarity of a sentence with others, by their embeddings."""

    name = "embed"
    head = "embed"
    paths = ()
    summary = "Compare a sentence with others."
    request = SimilarityRequest
    response = list[float]

    def inputs(self, request: SimilarityRequest) -> list[ModelInput]:
        schema.check_count(len(request.sentences), self.config.max_texts - 1, "sentences")
        return [request.source_sentence, *request.sentences]

    def reply(self, request: SimilarityRequest, encoded: Encoded) -> list[float]:
        rows = to_unit(np.asarray(encoded.rows))
        return [float(value) for value in rows[1:] @ rows[0]]


class TokenVectorsRequest(VectorRequest, frozen=True, kw_only=True):
    """Texts whose tokens' vectors are wanted."""


class TokenVectors(Task[TokenVectorsRequest]):
    """Vectors of all tokens of a text, special tokens included; not normalized."""

    name = "embed"
    head = "embed-tokens"
    paths = ()
    summary = "Compute the vector of every token of one or more texts."
    request = TokenVectorsRequest
    response = list[list[list[float]]]

    def inputs(self, request: TokenVectorsRequest) -> list[ModelInput]:
        return read_inputs(request, self.model, min(MAX_TOKEN_TEXTS, self.config.max_texts))

    def reply(self, request: TokenVectorsRequest, encoded: Encoded) -> Any:
        return to_json(request, list(encoded.rows))


def to_unit(rows: Rows) -> Rows:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), np.float32)
