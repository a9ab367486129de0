"""Order of measurements in interleaved rounds, and statistics over rounds. Pure functions."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of one quantity, one per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    def over(self, other: "Summary") -> "Summary":
        """Return the ratio to ``other`` in each round, so slow rounds cancel out."""
        return Summary(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def minus(self, other: "Summary") -> "Summary":
        """Return the difference to ``other`` in each round."""
        return Summary(tuple(a - b for a, b in zip(self.rounds, other.rounds, strict=True)))


def interleave(names: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name) so that each round has every name once.

    Each round starts with another name, so none always runs first or after the same other one.
    """
    for number in range(num_rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield number, name


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by nearest rank."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
