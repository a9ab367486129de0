"""``/v1/embeddings``: vectors of texts or token ids, in OpenAI's format."""

import base64
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.json import Encoder

from cluster.engines.classifier.model.types import Rows, TokenIds
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import (
    ListReply,
    Task,
    WindowedRequest,
    split_windows,
    usage,
    with_windows,
)
from cluster.errors import InvalidRequestError

encode_json = Encoder().encode

DECIMALS = 8
"""Decimals of a float in JSON. float32 has 7 or 8 significant ones; the default writes 17."""


class EmbeddingsRequest(WindowedRequest, frozen=True, kw_only=True):
    """Body of ``POST /v1/embeddings``: OpenAI's fields and those for long texts."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: schema.AtLeastOne | None = None
    user: str | None = None


class EmbeddedWindow(Struct, frozen=True):
    """Vector of the characters from ``start`` up to ``end``."""

    start: int
    end: int
    embedding: list[float] | str


class Embedding(Struct, frozen=True):
    """Vector of one text; a string is base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"
    windows: list[EmbeddedWindow] | UnsetType = UNSET


class EmbeddingsReply(ListReply[Embedding], frozen=True, kw_only=True):
    """Reply of ``POST /v1/embeddings``."""


class Embed(Task[EmbeddingsRequest]):
    """Task ``embed``."""

    name = "embed"
    head = "embed"
    paths = ("/v1/embeddings",)
    summary = "Compute the embedding of one or more texts."
    request = EmbeddingsRequest
    response = EmbeddingsReply

    def inputs(self, request: EmbeddingsRequest) -> list[str] | list[TokenIds]:
        """Return the texts or token ids; see ``Task``."""
        width = self.model.embedding_size
        if request.dimensions and request.dimensions > width:
            message = f"dimensions is {request.dimensions}; the model has {width}"
            raise InvalidRequestError(message, param="dimensions")
        schema.check_count(len(request.input) if isinstance(request.input, list) else 1, 1 << 62)
        items = schema.split_input(request.input)
        schema.check_count(len(items), self.config.max_texts)
        texts = [item for item in items if isinstance(item, str)]
        if texts:
            return texts
        ids = [item for item in items if isinstance(item, list)]
        return [self._token_ids(index, row, request) for index, row in enumerate(ids)]

    def reply(self, request: EmbeddingsRequest, encoded: Encoded) -> EmbeddingsReply:
        """Return the vector of each text; see ``Task``."""
        rows = encoded.rows_by_text(request.aggregate)
        if encoded.windows and self.model.pooling.normalize:
            rows = to_unit(rows)
        vectors = self._to_json(request, rows)
        data = [Embedding(index, vector) for index, vector in enumerate(vectors)]
        if request.windows:
            data = with_windows(data, self._windows(request, encoded))
        return EmbeddingsReply(data=data, model=self.config.name, usage=usage(encoded))

    def _to_json(self, request: EmbeddingsRequest, rows: Rows) -> Sequence[list[float] | str]:
        """Return the vectors with the requested dimensions and format."""
        if request.dimensions is not None and request.dimensions < rows.shape[1]:
            rows = rows[:, : request.dimensions]
            rows = to_unit(rows) if self.model.pooling.normalize else rows
        if request.encoding_format == "base64":
            return [_base64(row) for row in rows]
        # Encode row by row: encoding thousands of rows in one call would hold the GIL throughout.
        # The cast keeps the field's type, which appears in the OpenAPI document, a list of numbers.
        rounded = rows.astype(np.float64).round(DECIMALS)
        return [cast(list[float], Raw(encode_json(row.tolist()))) for row in rounded]

    def _windows(self, request: EmbeddingsRequest, encoded: Encoded) -> list[list[EmbeddedWindow]]:
        vectors = self._to_json(request, np.asarray(encoded.rows))
        return [
            [EmbeddedWindow(window.start, window.end, vector) for window, vector in windows]
            for windows in split_windows(encoded, vectors)
        ]

    def _token_ids(self, index: int, ids: list[int], request: EmbeddingsRequest) -> TokenIds:
        if request.stride is not None:
            raise InvalidRequestError("token ids cannot be read in windows", param="stride")
        row = schema.check_ids(index, ids, self.model.vocab_size)
        limit = self.model.tokenizer.max_tokens
        if len(row) <= limit:
            return row
        if not request.truncate:
            raise self.model.tokenizer.too_long_error(index, len(row))
        return row[len(row) - limit :] if request.truncate == "left" else row[:limit]


def to_unit(rows: Rows) -> Rows:
    """Return the rows at unit length."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), np.float32)


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
