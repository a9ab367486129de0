"""LoRA adapters that each replica has loaded, inferred from the requests that it was given."""

import numpy as np

from cluster.routing.table import FloatArray


class LoadedAdapters:
    """Adapters of each row; a replica evicts the least recently used one above ``max_loaded``."""

    def __init__(self, max_loaded: int) -> None:
        self._max_loaded = max_loaded
        self._full: FloatArray = np.zeros(0)  # 1.0 for rows with ``max_loaded`` adapters
        self._missing: dict[str, FloatArray] = {}  # 1.0 for rows without the adapter
        self._loaded: dict[int, dict[str, None]] = {}  # the least recently used one first

    def grow(self, size: int) -> None:
        num_new = size - len(self._full)
        self._full = np.concatenate((self._full, np.zeros(num_new)))
        for name, array in self._missing.items():
            self._missing[name] = np.concatenate((array, np.ones(num_new)))

    def set_max_loaded(self, max_loaded: int) -> None:
        """Change the limit; rows above it evict when they load the next adapter."""
        self._max_loaded = max_loaded
        for row, loaded in self._loaded.items():
            self._full[row] = len(loaded) >= max_loaded

    def num_loads(self, adapter: str) -> FloatArray:
        """Return the loads that a request for the adapter causes on each row: 0, 1 or 2.

        Two where another adapter is evicted, which will have to be loaded again somewhere.
        """
        missing = self._missing.get(adapter)
        return 1.0 + self._full if missing is None else missing * (1.0 + self._full)

    def record_use(self, row: int, adapter: str) -> None:
        """Record that a row got a request for an adapter, so it has it or loads it."""
        loaded = self._loaded.setdefault(row, {})
        if loaded.pop(adapter, 0) == 0:
            self._missing.setdefault(adapter, np.ones(len(self._full)))[row] = 0.0
        loaded[adapter] = None
        while len(loaded) > self._max_loaded:
            self._evict(row, next(iter(loaded)))
        self._full[row] = len(loaded) == self._max_loaded

    def forget_row(self, row: int) -> None:
        for adapter in list(self._loaded.get(row, ())):
            self._evict(row, adapter)
        self._loaded.pop(row, None)
        self._full[row] = 0.0

    def _evict(self, row: int, adapter: str) -> None:
        del self._loaded[row][adapter]
        missing = self._missing[adapter]
        missing[row] = 1.0
        if missing.all():
            del self._missing[adapter]
