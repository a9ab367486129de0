"""``/v1/embeddings``: vectors of texts or token ids, in OpenAI's format."""

import base64
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.json import Encoder

from cluster.engines.classifier.model.template import cut_ids
from cluster.engines.classifier.model.types import Rows, TokenIds
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task, with_windows
from cluster.errors import InvalidRequestError, UnprocessableError

encode_json = Encoder().encode

DECIMALS = 8
"""Decimals of a float in JSON. float32 has 7 or 8 significant ones; the default writes 17."""


class EmbeddingsRequest(schema.WindowedRequest, frozen=True, kw_only=True):
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


class EmbeddingsReply(schema.ListReply[Embedding], frozen=True, kw_only=True):
    """Reply of ``POST /v1/embeddings``."""


class Embed(Task[EmbeddingsRequest]):
    """Task ``embed``."""

    name = "embed"
    head = "embed"
    paths = ("/v1/embeddings",)
    summary = "Compute the embedding of one or more texts."
    request = EmbeddingsRequest
    response = EmbeddingsReply

    def inputs(self, request: EmbeddingsRequest) -> list[str | TokenIds]:
        width = self.model.embedding_size
        if request.dimensions and request.dimensions > width:
            message = f"dimensions is {request.dimensions}; the model has {width}"
            raise InvalidRequestError(message, param="dimensions")
        items = _split_input(request.input)
        schema.check_count(len(items), self.config.max_texts)
        return [
            item if isinstance(item, str) else self._token_ids(index, item, request)
            for index, item in enumerate(items)
        ]

    def reply(self, request: EmbeddingsRequest, encoded: Encoded) -> EmbeddingsReply:
        rows = encoded.rows_by_text(request.aggregate)
        if encoded.windows and self.model.pooling.normalize:
            rows = to_unit(rows)
        vectors = self._to_json(request, rows)
        data = [Embedding(index, vector) for index, vector in enumerate(vectors)]
        if request.windows:
            vectors = self._to_json(request, np.asarray(encoded.rows))
            data = with_windows(data, encoded, vectors, EmbeddedWindow)
        return EmbeddingsReply(data=data, model=self.config.name, usage=schema.usage(encoded))

    def _to_json(self, request: EmbeddingsRequest, rows: Rows) -> Sequence[list[float] | str]:
        if request.dimensions is not None and request.dimensions < rows.shape[1]:
            rows = rows[:, : request.dimensions]
            rows = to_unit(rows) if self.model.pooling.normalize else rows
        if request.encoding_format == "base64":
            return [_base64(row) for row in rows]
        # Encode row by row: encoding thousands of rows in one call would hold the GIL throughout.
        # The cast keeps the field's type, which appears in the OpenAPI document, a list of numbers.
        rounded = rows.astype(np.float64).round(DECIMALS)
        return [cast(list[float], Raw(encode_json(row.tolist()))) for row in rounded]

    def _token_ids(self, index: int, ids: list[int], request: EmbeddingsRequest) -> TokenIds:
        if request.stride is not None:
            raise InvalidRequestError("token ids cannot be read in windows", param="stride")
        if not ids:
            message = f"input[{index}] is empty; at least one token id is needed"
            raise InvalidRequestError(message, param="input")
        last = self.model.vocab_size - 1
        for token in (min(ids), max(ids)):
            if not 0 <= token <= last:
                message = f"input[{index}] has the token id {token}; allowed: 0 to {last}"
                raise InvalidRequestError(message, param="input")
        limit = self.model.tokenizer.max_tokens
        if len(ids) > limit:
            if not request.truncate:
                raise self.model.tokenizer.too_long_error(index, len(ids))
            ids = cut_ids(ids, limit, "left" if request.truncate == "left" else "right")
        return np.array(ids, np.int64)


def _split_input(items: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the four shapes of OpenAI's ``input`` as a list of texts or of lists of token ids."""
    if isinstance(items, str):
        return [items]
    types = set(map(type, items))
    if len(types) > 1:
        message = "input: expected texts, token ids, or lists of token ids, got a mixture"
        raise UnprocessableError(message, param="input")
    return cast(list[str | list[int]], [items] if types == {int} else items)


def to_unit(rows: Rows) -> Rows:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), np.float32)


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
