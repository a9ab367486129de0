"""Which LoRA adapters each replica has loaded, as far as a router knows: by what it gave them."""

import numpy as np

from cluster.routing.arrays import FloatArray


class Adapters:
    """For each adapter the slots that have it, for each slot its adapters.

    Args:
        max_loaded: Adapters that a replica has; what it was asked for longest ago goes first.
    """

    def __init__(self, max_loaded: int) -> None:
        self._max_loaded = max_loaded
        self._full: FloatArray = np.zeros(0)
        self._missing: dict[str, FloatArray] = {}
        self._loaded: dict[int, dict[str, None]] = {}  # the one used longest ago first

    def grow(self, size: int) -> None:
        """Make room for ``size`` slots."""
        more = size - len(self._full)
        self._full = np.concatenate((self._full, np.zeros(more)))
        for name, array in self._missing.items():
            self._missing[name] = np.concatenate((array, np.ones(more)))

    def loads(self, adapter: str) -> FloatArray:
        """What a request for it makes each slot load: 0, 1, or 2 where another one has to go.

        That one will have to be loaded again, here or elsewhere.
        """
        missing = self._missing.get(adapter)
        return 1.0 + self._full if missing is None else missing * (1.0 + self._full)

    def note(self, slot: int, adapter: str) -> None:
        """A slot was given a request for an adapter, so it has it or loads it."""
        loaded = self._loaded.setdefault(slot, {})
        if loaded.pop(adapter, 0) == 0:
            self._missing.setdefault(adapter, np.ones(len(self._full)))[slot] = 0.0
        loaded[adapter] = None
        if len(loaded) > self._max_loaded:
            self._drop(slot, next(iter(loaded)))
        self._full[slot] = len(loaded) == self._max_loaded

    def forget(self, slot: int) -> None:
        """A slot has none any more."""
        for adapter in list(self._loaded.get(slot, ())):
            self._drop(slot, adapter)
        self._loaded.pop(slot, None)
        self._full[slot] = 0.0

    def _drop(self, slot: int, adapter: str) -> None:
        del self._loaded[slot][adapter]
        missing = self._missing[adapter]
        missing[slot] = 1.0
        if missing.all():
            del self._missing[adapter]
