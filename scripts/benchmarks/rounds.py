"""Rounds: who is measured when, and what several rounds say together. Pure."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """One number, measured once in every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.rounds)

    def over(self, other: "Summary") -> "Summary":
        """The ratio to ``other``, round by round: what slows a whole round cancels out."""
        return Summary(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def minus(self, other: "Summary") -> "Summary":
        """The difference to ``other``, round by round."""
        return Summary(tuple(a - b for a, b in zip(self.rounds, other.rounds, strict=True)))


def interleaved(names: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """Each name once in every round; each round begins with another one, so that none always
    runs first or after the same other."""
    for number in range(num_rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield number, name


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of them lie, by nearest rank."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]
