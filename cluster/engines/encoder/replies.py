"""Rows to JSON bodies."""

import base64
from collections.abc import Sequence

import msgspec
import numpy as np

from cluster.engines.encoder.jobs import Encoded, Rows

encode_json = msgspec.json.Encoder().encode


class Score(msgspec.Struct, frozen=True, gc=False):
    """A label and how strongly it holds."""

    label: str
    score: float


class Classified(msgspec.Struct, frozen=True):
    """One text's labels, the best first."""

    index: int
    label: str
    score: float
    scores: list[Score]


def classify_body(encoded: Encoded, model: str, labels: Sequence[str], top_k: int | None) -> bytes:
    """The answer of ``/classify``."""
    order = np.argsort(-encoded.rows, axis=1, kind="stable")[:, :top_k]
    best = np.take_along_axis(encoded.rows, order, axis=1)
    data = []
    for index, (columns, values) in enumerate(zip(order.tolist(), best.tolist(), strict=True)):
        scores = [Score(labels[c], v) for c, v in zip(columns, values, strict=True)]
        data.append(Classified(index, scores[0].label, scores[0].score, scores))
    return _body(data, model, encoded.num_tokens)


def embeddings_body(encoded: Encoded, model: str, dimensions: int | None, as_text: bool) -> bytes:
    """The answer of ``/v1/embeddings``; ``as_text``: base64 of little-endian float32."""
    rows = shorten(encoded.rows, dimensions)
    vectors = map(_base64, rows) if as_text else rows.tolist()
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    return _body(data, model, encoded.num_tokens)


def shorten(rows: Rows, dimensions: int | None) -> Rows:
    """The first ``dimensions`` of each vector, at unit length again."""
    if dimensions is None or dimensions == rows.shape[1]:
        return rows
    cut = rows[:, :dimensions]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(cut / np.maximum(norms, 1e-12), np.float32)


def _base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def _body(data: object, model: str, num_tokens: int) -> bytes:
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return encode_json({"object": "list", "data": data, "model": model, "usage": usage})
