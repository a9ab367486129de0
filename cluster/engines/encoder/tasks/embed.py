"""``/v1/embeddings``: texts, or token ids, as vectors; OpenAI's format."""

import base64
from typing import Literal

import numpy as np
from msgspec import Struct

from cluster.engines.encoder import schema
from cluster.engines.encoder.jobs import Encoded, Rows, TokenIds
from cluster.engines.encoder.tasks.base import Listing, Request, Task, usage
from cluster.errors import InvalidRequestError


class EmbeddingsRequest(Request, frozen=True, kw_only=True):
    """The body of ``POST /v1/embeddings``: OpenAI's, and ``truncate``."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: schema.AtLeastOne | None = None
    user: str | None = None


class Embedding(Struct, frozen=True):
    """One text's vector; as a string it is base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingsReply(Listing[Embedding], frozen=True, kw_only=True):
    """The answer of ``POST /v1/embeddings``."""


class Embed(Task[EmbeddingsRequest]):
    """See the module."""

    name = "embed"
    head = "embed"
    paths = ("/v1/embeddings",)
    summary = "A text, or each of a list, as a unit vector."
    request = EmbeddingsRequest
    response = EmbeddingsReply

    def inputs(self, request: EmbeddingsRequest) -> list[str] | list[TokenIds]:
        """See ``Task``."""
        hidden_size = self.model.hidden_size
        if request.dimensions and request.dimensions > hidden_size:
            message = f"dimensions is {request.dimensions}; the model has {hidden_size}"
            raise InvalidRequestError(message, param="dimensions")
        schema.check_count(len(request.input) if isinstance(request.input, list) else 1, 1 << 62)
        items = schema.split_input(request.input)
        schema.check_count(len(items), self.config.max_texts)
        texts = [item for item in items if isinstance(item, str)]
        if texts:
            return texts
        ids = [item for item in items if isinstance(item, list)]
        return [self._token_ids(index, row, request.truncate) for index, row in enumerate(ids)]

    def reply(self, request: EmbeddingsRequest, encoded: Encoded) -> EmbeddingsReply:
        """See ``Task``."""
        rows = shorten(encoded.rows, request.dimensions)
        vectors = map(_base64, rows) if request.encoding_format == "base64" else rows.tolist()
        data = [Embedding(index, vector) for index, vector in enumerate(vectors)]
        return EmbeddingsReply(data=data, model=self.config.name, usage=usage(encoded))

    def _token_ids(self, index: int, ids: list[int], truncate: bool) -> TokenIds:
        row = schema.check_ids(index, ids, self.model.vocab_size)
        tokenizer = self.model.tokenizer
        if len(row) > tokenizer.max_tokens and not truncate:
            raise tokenizer.too_long(index, len(row))
        return row[: tokenizer.max_tokens]


def shorten(rows: Rows, dimensions: int | None) -> Rows:
    """The first ``dimensions`` of each vector, at unit length again."""
    if dimensions is None or dimensions == rows.shape[1]:
        return rows
    cut = rows[:, :dimensions]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(cut / np.maximum(norms, 1e-12), np.float32)


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
