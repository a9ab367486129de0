"""Figures of one version of a model: sums that only grow, so that a period is a difference."""

from itertools import zip_longest
from operator import add, sub
from typing import Any

import msgspec


class Figures(msgspec.Struct, frozen=True):
    """Answers of one version. Histograms have the buckets of the router's metrics."""

    finished: int = 0
    """Requests that ended, except disconnects and timeouts of clients."""
    failed: int = 0
    """Finished requests that failed, or that only the other version could answer."""
    lengths: int = 0
    """Answers with a known number of completion tokens."""
    tokens: float = 0.0
    """Sum of their completion tokens."""
    squared_tokens: float = 0.0
    """Sum of the squares of their completion tokens."""
    ttft: tuple[int, ...] = ()
    itl: tuple[int, ...] = ()
    latency: tuple[int, ...] = ()
    compared: int = 0
    """Texts that both versions labeled."""
    agreed: int = 0
    """Compared texts with the same label."""

    def __add__(self, other: "Figures") -> "Figures":
        return self._combine(other, add)

    def __sub__(self, other: "Figures") -> "Figures":
        return self._combine(other, sub)

    @property
    def mean_tokens(self) -> float:
        """Mean number of completion tokens of an answer."""
        return self.tokens / self.lengths if self.lengths else 0.0

    def _combine(self, other: "Figures", operation: Any) -> "Figures":
        combined: dict[str, Any] = {}
        for name in self.__struct_fields__:
            first, second = getattr(self, name), getattr(other, name)
            if isinstance(first, tuple):
                pairs = zip_longest(first, second, fillvalue=0)
                combined[name] = tuple(operation(a, b) for a, b in pairs)
            else:
                combined[name] = operation(first, second)
        return Figures(**combined)


class Totals(msgspec.Struct, frozen=True):
    """Figures of both versions."""

    old: Figures = Figures()
    new: Figures = Figures()

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.old + other.old, self.new + other.new)

    def __sub__(self, other: "Totals") -> "Totals":
        return Totals(self.old - other.old, self.new - other.new)
