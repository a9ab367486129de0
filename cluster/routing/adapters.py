"""Which LoRA adapters each replica has loaded, as far as a router knows."""

from collections.abc import Iterable

import numpy as np

from cluster.routing.arrays import FloatArray

MAX_LOADED = 8
"""Adapters that one replica is taken to hold; what it was asked for longest ago goes first."""


class Adapters:
    """For each adapter the slots that have it, for each slot its adapters."""

    def __init__(self, max_loaded: int = MAX_LOADED) -> None:
        self._max_loaded = max_loaded
        self._size = 0
        self._missing: dict[str, FloatArray] = {}
        self._loaded: dict[int, dict[str, None]] = {}  # the one used longest ago first

    def grow(self, size: int) -> None:
        """Make room for ``size`` slots."""
        self._size = size
        for name, array in self._missing.items():
            made = np.ones(size)
            made[: len(array)] = array
            self._missing[name] = made

    def missing(self, adapter: str) -> FloatArray | None:
        """1 for each slot that would have to load it, else 0; None: every slot would."""
        return self._missing.get(adapter)

    def note(self, slot: int, adapter: str) -> None:
        """A slot was given a request for an adapter, so it has it or loads it."""
        loaded = self._loaded.setdefault(slot, {})
        if loaded.pop(adapter, 0) == 0:
            self._missing.setdefault(adapter, np.ones(self._size))[slot] = 0.0
        loaded[adapter] = None
        if len(loaded) > self._max_loaded:
            self._drop(slot, next(iter(loaded)))

    def replace(self, slot: int, adapters: Iterable[str]) -> None:
        """A slot says which adapters it has."""
        self.forget(slot)
        for adapter in adapters:
            self.note(slot, adapter)

    def forget(self, slot: int) -> None:
        """A slot has none any more."""
        for adapter in list(self._loaded.get(slot, ())):
            self._drop(slot, adapter)
        self._loaded.pop(slot, None)

    def _drop(self, slot: int, adapter: str) -> None:
        del self._loaded[slot][adapter]
        missing = self._missing[adapter]
        missing[slot] = 1.0
        if missing.all():
            del self._missing[adapter]
