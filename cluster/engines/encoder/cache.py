"""The result cache: what the model gave for a text, for as long as there is room.

It belongs to one loaded model, so a new version of a model begins with an empty one. Used on the
event loop alone.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.engines.encoder.jobs import Encoded, Text, num_chars

OVERHEAD_BYTES = 1000
"""What an entry takes beside its text and rows: measured 0.9 kB for a row without windows."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a result depends on."""

    tenant: bytes
    """Empty where tenants are not isolated."""
    how: Hashable
    """What was computed, and how texts were cut."""
    text: Text


class ResultCache:
    """Results by text; the least recently used go first.

    Args:
        max_bytes: What all of it may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[CacheKey, tuple[Encoded, int]] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: CacheKey) -> Encoded | None:
        """What was kept for ``key``; counted as a hit or a miss."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: CacheKey, result: Encoded) -> None:
        """Keep the result of one text, which must own its arrays."""
        size = _size(key, result)
        if size > self._max_bytes:
            return
        if old := self._entries.pop(key, None):
            self.num_bytes -= old[1]
        self._entries[key] = (result, size)
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed


def _size(key: CacheKey, result: Encoded) -> int:
    rows = result.rows
    arrays: list[NDArray[Any]] = [rows] if isinstance(rows, np.ndarray) else list(rows)
    for windows in result.windows:
        arrays += [array for window in windows for array in (window.spans, window.continues)]
    text = 4 * num_chars(key.text)  # a character of a Python string takes up to 4 bytes
    return text + OVERHEAD_BYTES * len(arrays) + sum(array.nbytes for array in arrays)
