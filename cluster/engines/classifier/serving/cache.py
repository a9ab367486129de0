"""Result cache in front of the service; used on the event loop only.

The cache belongs to one loaded model, so a new version of a model starts with an empty one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from cluster.config import ResultCacheConfig
from cluster.engines.classifier.model.tokenizer import USUAL, PlainReader
from cluster.engines.classifier.model.types import ModelInput, Text, num_chars
from cluster.engines.classifier.model.windows import WindowReader
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions, Timings
from cluster.engines.classifier.serving.service import ClassifierService
from cluster.errors import InvalidRequestError

OVERHEAD_BYTES = 600
"""Memory of one cached array besides its content; tracemalloc reports 490 for a single row."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything a result depends on."""

    tenant: bytes
    """Empty if tenants share results."""
    options: EncodeOptions
    text: Text


class ResultCache:
    """Least-recently-used cache; ``max_bytes`` limits the memory of keys and results."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[CacheKey, tuple[Encoded, int]] = LRUCache(
            max_bytes, getsizeof=itemgetter(1)
        )
        self.hits = 0
        self.misses = 0

    @property
    def num_bytes(self) -> int:
        """Estimated memory in use."""
        return int(self._entries.currsize)

    def get(self, key: CacheKey) -> Encoded | None:
        """Return the cached result, and count a hit or a miss."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return entry[0]

    def put(self, key: CacheKey, result: Encoded) -> None:
        """Cache the result of one text; its arrays must not be views of larger ones."""
        size = _num_bytes(key, result)
        if size <= self._entries.maxsize:
            self._entries[key] = result, size


class CachingService:
    """Started classifier service, called only for what the cache lacks."""

    def __init__(self, service: ClassifierService, config: ResultCacheConfig) -> None:
        self.service = service
        self.cache = ResultCache(config.max_bytes) if config.max_bytes else None
        self.isolates_tenants = self.cache is not None and config.isolate_tenants
        """True if ``encode`` needs the tenant."""

    async def encode(
        self, options: EncodeOptions, inputs: Sequence[ModelInput], tenant: bytes = b""
    ) -> Encoded:
        """Return the model's results for ``inputs``, in order; see ``ClassifierService.encode``."""
        cache = self.cache
        texts = [text for text in inputs if isinstance(text, (str, tuple))]
        if cache is None or len(texts) < len(inputs):
            return await self._compute(options, inputs)
        owner = tenant if self.isolates_tenants else b""
        keys = [CacheKey(owner, options, text) for text in texts]
        results = [cache.get(key) for key in keys]
        missing = [index for index, result in enumerate(results) if result is None]
        timings = Timings(0.0, 0.0, 0.0)
        if missing:
            computed = await self._compute_missing(options, texts, missing)
            timings = computed.timings
            for index, part in zip(missing, _split(computed), strict=True):
                results[index] = part
                cache.put(keys[index], part)
        return _join([result for result in results if result is not None], timings)

    async def _compute_missing(
        self, options: EncodeOptions, texts: Sequence[Text], missing: Sequence[int]
    ) -> Encoded:
        try:
            return await self._compute(options, [texts[index] for index in missing])
        except InvalidRequestError:
            # The error names an index within the missing texts. Validate the whole request again
            # for an error with the client's index.
            if len(missing) < len(texts):
                await self._compute(options, texts)
            raise

    async def _compute(self, options: EncodeOptions, inputs: Sequence[ModelInput]) -> Encoded:
        tokenizer, tokenization = self.service.model.tokenizer, options.tokenization
        if options.stride is not None or options.with_offsets:
            reader = WindowReader(tokenizer, options.side, options.stride, tokenization or USUAL)
            encoded = await self.service.encode(options.head, inputs, reader)
            return replace(encoded, windows=reader.windows)
        plain = tokenizer.readers[options.side]  # shared, so that requests are tokenized together
        if tokenization is not None:
            plain = PlainReader(tokenizer, options.side, tokenization)
        return await self.service.encode(options.head, inputs, plain)


def _num_bytes(key: CacheKey, result: Encoded) -> int:
    rows = result.rows
    arrays: list[NDArray[Any]] = [rows] if isinstance(rows, np.ndarray) else list(rows)
    for windows in result.windows:
        arrays += [array for window in windows for array in (window.spans, window.continues)]
    text = 4 * num_chars(key.text)  # Python strings take up to 4 bytes per character
    return text + OVERHEAD_BYTES * len(arrays) + sum(array.nbytes for array in arrays)


def _split(encoded: Encoded) -> list[Encoded]:
    """Return one result per text, with copied arrays."""
    counts = [len(windows) for windows in encoded.windows] or [1] * len(encoded.rows)
    parts = []
    start = 0
    for index, count in enumerate(counts):
        run = slice(start, start + count)
        rows = encoded.rows[run]
        copied = rows.copy() if isinstance(rows, np.ndarray) else [row.copy() for row in rows]
        windows = encoded.windows[index : index + 1]
        parts.append(Encoded(copied, encoded.lengths[run], encoded.timings, windows))
        start += count
    return parts


def _join(parts: Sequence[Encoded], timings: Timings) -> Encoded:
    rows = [part.rows for part in parts]
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    joined = np.concatenate(arrays) if arrays else [row for part in rows for row in part]
    lengths = [length for part in parts for length in part.lengths]
    return Encoded(joined, lengths, timings, [w for part in parts for w in part.windows])
