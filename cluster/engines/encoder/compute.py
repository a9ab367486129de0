"""From a task's inputs to what the model gives for them: whole or in windows, cached or computed.

Runs on the event loop; owns the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.config import ClassifierTask, ResultCacheConfig
from cluster.engines.encoder.cache import CacheKey, ResultCache
from cluster.engines.encoder.jobs import Encoded, Text, Timings, TokenIds
from cluster.engines.encoder.model import LoadedModel
from cluster.engines.encoder.service import EncoderService
from cluster.engines.encoder.template import Side
from cluster.engines.encoder.tokenizer import PlainReader
from cluster.engines.encoder.windows import WindowReader
from cluster.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class How:
    """What is computed of each text, and how it is read."""

    head: ClassifierTask
    side: Side | None = None
    """Where a text that is too long is cut; None refuses it, unless there is a stride."""
    stride: int | None = None
    """Tokens that neighbouring windows share."""
    located: bool = False
    """Whether the places of the tokens are wanted."""
    most_second: int | None = None
    """Tokens of a pair's second text that are read; None: all that fit."""


class Computer:
    """Asks the service, and the cache before it.

    Args:
        service: A started service.
        cache: How much is kept.
    """

    def __init__(self, service: EncoderService, cache: ResultCacheConfig) -> None:
        self._service = service
        self._isolate = cache.isolate_tenants
        self.cache = ResultCache(cache.max_bytes) if cache.max_bytes else None

    @property
    def model(self) -> LoadedModel:
        """The service's model."""
        return self._service.model

    @property
    def isolates_tenants(self) -> bool:
        """Whether ``compute`` looks at the tenant."""
        return self.cache is not None and self._isolate

    async def compute(
        self, how: How, inputs: Sequence[Text] | Sequence[TokenIds], tenant: bytes = b""
    ) -> Encoded:
        """What the model gives for ``inputs``, in order.

        Raises:
            RequestError: see ``EncoderService.encode``.
        """
        texts = [text for text in inputs if isinstance(text, (str, tuple))]
        if self.cache is None or len(texts) < len(inputs):
            return await self._encode(how, inputs)
        keys = [CacheKey(tenant if self._isolate else b"", how, text) for text in texts]
        return await self._through(self.cache, keys, how, texts)

    async def _through(
        self, cache: ResultCache, keys: Sequence[CacheKey], how: How, texts: Sequence[Text]
    ) -> Encoded:
        found = [cache.get(key) for key in keys]
        missing = [index for index, result in enumerate(found) if result is None]
        timings = Timings(0.0, 0.0, 0.0)
        if missing:
            computed = await self._missing(how, texts, missing)
            timings = computed.timings
            for index, part in zip(missing, _split(computed), strict=True):
                found[index] = part
                cache.put(keys[index], part)
        return _join([result for result in found if result is not None], timings)

    async def _missing(self, how: How, texts: Sequence[Text], missing: Sequence[int]) -> Encoded:
        try:
            return await self._encode(how, [texts[index] for index in missing])
        except InvalidRequestError:
            if len(missing) < len(texts):  # an error names the text's place in the whole request
                await self._encode(how, texts)
            raise

    async def _encode(self, how: How, inputs: Sequence[Text] | Sequence[TokenIds]) -> Encoded:
        texts = self._service.model.tokenizer
        if how.stride is not None or how.located:
            windows = WindowReader(texts, how.side, how.stride, how.most_second)
            encoded = await self._service.encode(how.head, inputs, reader=windows)
            return replace(encoded, windows=windows.windows)
        own = PlainReader(texts, how.side, how.most_second) if how.most_second else None
        return await self._service.encode(how.head, inputs, how.side or False, own)


def _split(encoded: Encoded) -> list[Encoded]:
    """The result of each text by itself, in arrays of its own."""
    counts = [len(windows) for windows in encoded.windows] or [1] * len(encoded.rows)
    parts = []
    first = 0
    for index, count in enumerate(counts):
        place = slice(first, first + count)
        rows = encoded.rows[place]
        own = rows.copy() if isinstance(rows, np.ndarray) else [row.copy() for row in rows]
        windows = encoded.windows[index : index + 1]
        parts.append(Encoded(own, encoded.lengths[place], encoded.timings, windows))
        first += count
    return parts


def _join(parts: Sequence[Encoded], timings: Timings) -> Encoded:
    rows = [part.rows for part in parts]
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    joined = np.concatenate(arrays) if arrays else [r for row in rows for r in row]
    lengths = [length for part in parts for length in part.lengths]
    return Encoded(joined, lengths, timings, [w for part in parts for w in part.windows])
