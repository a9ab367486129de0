"""Startup helpers: timing of the phases, and imports without garbage collection."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class StartupTimer:
    """Durations of startup phases, which follow each other without a gap."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marked_at = clock()
        self.phases_s: dict[str, float] = {}
        """Duration of each phase in seconds, in order."""

    def mark(self, phase: str) -> None:
        """Attribute the time since the last mark to ``phase``."""
        self.add_measured({phase: self._clock() - self._marked_at})

    def add_measured(self, phases_s: Mapping[str, float]) -> None:
        """Attribute part of the time since the last mark to phases that were measured elsewhere."""
        for phase, duration_s in phases_s.items():
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + duration_s
            self._marked_at += duration_s

    @property
    def total_s(self) -> float:
        """Time from construction to the last mark, in seconds."""
        return sum(self.phases_s.values())


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection, and freeze the objects that exist at the end.

    Use it for importing code only: a model that is part of a reference cycle would never be freed.
    """
    # Imports create a million objects that live as long as the process; scanning them repeatedly
    # takes a fifth of the import time. A final collection before the freeze would free 1 % of them
    # and cost a third of what this saves (ADR 10).
    # A second engine in the process imports nothing new, and freezing again would also keep the
    # garbage of the first engine.
    is_first = not gc.get_freeze_count()
    gc.disable()
    try:
        yield
        if is_first:
            gc.freeze()
    finally:
        gc.enable()
