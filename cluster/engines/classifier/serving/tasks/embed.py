"""``/v1/embeddings``: texts, or token ids, as vectors; OpenAI's format."""

import base64
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.json import Encoder
from msgspec.structs import replace

from cluster.engines.classifier.model.types import Rows, TokenIds
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import (
    Listing,
    Task,
    WindowedRequest,
    split_windows,
    usage,
)
from cluster.errors import InvalidRequestError

encode_json = Encoder().encode

DECIMALS = 8
"""Of a float in JSON: float32 has 7 or 8 that mean something, and would be written with 17."""


class EmbeddingsRequest(WindowedRequest, frozen=True, kw_only=True):
    """The body of ``POST /v1/embeddings``: OpenAI's, and what concerns long texts."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: schema.AtLeastOne | None = None
    user: str | None = None


class EmbeddedWindow(Struct, frozen=True):
    """The vector of the characters from ``start`` up to ``end``."""

    start: int
    end: int
    embedding: list[float] | str


class Embedding(Struct, frozen=True):
    """One text's vector; as a string it is base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"
    windows: list[EmbeddedWindow] | UnsetType = UNSET


class EmbeddingsReply(Listing[Embedding], frozen=True, kw_only=True):
    """The answer of ``POST /v1/embeddings``."""


class Embed(Task[EmbeddingsRequest]):
    """See the module."""

    name = "embed"
    head = "embed"
    paths = ("/v1/embeddings",)
    summary = "A text, or each of a list, as a vector."
    request = EmbeddingsRequest
    response = EmbeddingsReply

    def inputs(self, request: EmbeddingsRequest) -> list[str] | list[TokenIds]:
        """See ``Task``."""
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
        """See ``Task``."""
        rows = encoded.rows_by_text(request.aggregate)
        if encoded.windows and self.model.pooling.normalize:
            rows = to_unit(rows)
        vectors = self._written(request, rows)
        data = [Embedding(index, vector) for index, vector in enumerate(vectors)]
        if request.windows:
            pairs = zip(data, self._windows(request, encoded), strict=True)
            data = [replace(item, windows=windows) for item, windows in pairs]
        return EmbeddingsReply(data=data, model=self.config.name, usage=usage(encoded))

    def _written(self, request: EmbeddingsRequest, rows: Rows) -> Sequence[list[float] | str]:
        """The vectors in the form that was asked for."""
        if request.dimensions is not None and request.dimensions < rows.shape[1]:
            rows = rows[:, : request.dimensions]
            rows = to_unit(rows) if self.model.pooling.normalize else rows
        if request.encoding_format == "base64":
            return [_base64(row) for row in rows]
        # One by one and as JSON already: thousands at once would keep every thread from running.
        # What clients see are numbers, so the field's type, which they are told, does not say Raw.
        rounded = rows.astype(np.float64).round(DECIMALS)
        return [cast(list[float], Raw(encode_json(row.tolist()))) for row in rounded]

    def _windows(self, request: EmbeddingsRequest, encoded: Encoded) -> list[list[EmbeddedWindow]]:
        vectors = self._written(request, np.asarray(encoded.rows))
        return [
            [EmbeddedWindow(window.start, window.end, vector) for window, vector in windows]
            for windows in split_windows(encoded, vectors)
        ]

    def _token_ids(self, index: int, ids: list[int], request: EmbeddingsRequest) -> TokenIds:
        if request.stride is not None:
            raise InvalidRequestError("windows are made of texts, not of token ids", param="stride")
        row = schema.check_ids(index, ids, self.model.vocab_size)
        limit = self.model.tokenizer.max_tokens
        if len(row) <= limit:
            return row
        if not request.truncate:
            raise self.model.tokenizer.too_long(index, len(row))
        return row[len(row) - limit :] if request.truncate == "left" else row[:limit]


def to_unit(rows: Rows) -> Rows:
    """The rows at unit length."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), np.float32)


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
