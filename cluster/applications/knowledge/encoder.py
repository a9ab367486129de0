"""Tokens and vectors of texts, from a classifier pool."""

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.applications.calls import Calls
from cluster.applications.chunks import Part, cut
from cluster.applications.knowledge.passages import Tokens
from cluster.client.wire import ApiRequest

TOKENIZED_CHARS = 100_000
"""Characters of a text that are tokenized in one call; its answer has about 2 MB."""
TEXTS_PER_CALL = 128
"""Texts that are embedded in one call: many batches of the classifier."""

Vectors = NDArray[np.float32]


class Encoder:
    """A model of a classifier pool with the task ``embed``."""

    def __init__(self, model: str, calls: Calls) -> None:
        self.model = model
        self._calls = calls

    async def tokens(self, text: str) -> Tokens:
        """Return the positions of the model's tokens in a text."""
        parts = cut(text, Part(0, len(text)), TOKENIZED_CHARS)

        async def starts_of(part: Part) -> list[int]:
            body = {"model": self.model, "inputs": part.of(text), "add_special_tokens": False}
            request = ApiRequest("/tokenize", body, list)
            (found,) = await self._calls.ask(request)
            return [part.start + token["start"] for token in found if token["start"] is not None]

        starts = await self._calls.map(starts_of, parts)
        return Tokens([start for each in starts for start in each])

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Return a vector of unit length for each text, as rows; long texts are cut."""
        batches = [
            texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL)
        ]
        rows = await self._calls.map(self._embed, batches)
        vectors = np.concatenate(rows)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)

    async def _embed(self, texts: Sequence[str]) -> Vectors:
        body = {
            "model": self.model,
            "input": list(texts),
            "encoding_format": "base64",
            "truncate": True,
        }
        answer = await self._calls.post("/v1/embeddings", body)
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return np.stack(
            [np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in rows]
        )

    async def rerank(self, query: str, texts: Sequence[str]) -> list[int]:
        """Return the positions of the texts, most relevant to the query first."""
        body = {"model": self.model, "query": query, "documents": list(texts), "truncate": True}
        answer = await self._calls.post("/rerank", body)
        return [result["index"] for result in answer["results"]]
