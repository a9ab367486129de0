"""The Theil-Sen slope: the median of the slopes between pairs of points. Pure.

Up to 29 % of the points may be arbitrarily wrong (a batch that was large for a moment, a sample
that came late) and it stays near the truth; see P. K. Sen, JASA 63 (1968).
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

MAX_POINTS = 120
"""More are thinned out evenly: the pairs grow with the square."""


class Point(NamedTuple):
    """One sample of a process."""

    at_s: float
    resident_bytes: float
    ongoing: float
    """Requests that it was serving: the traffic to compare with."""


class Slope(NamedTuple):
    """What the pairs of a series say together."""

    bytes_per_s: float
    """Their median slope."""
    rising: float
    """Share of the pairs that rise, 0 to 1; equal ones count half."""


def theil_sen(
    points: Sequence[Point], counts: Callable[[Point, Point], bool] = lambda a, b: True
) -> Slope | None:
    """The slope over the pairs (earlier, later) that count; None where none does."""
    thinned = points[:: -(-len(points) // MAX_POINTS)] if points else ()
    slopes: list[float] = []
    for index, first in enumerate(thinned):
        slopes += [
            (second.resident_bytes - first.resident_bytes) / (second.at_s - first.at_s)
            for second in thinned[index + 1 :]
            if second.at_s > first.at_s and counts(first, second)
        ]
    if not slopes:
        return None
    rising = sum(slope > 0 for slope in slopes) + sum(slope == 0 for slope in slopes) / 2
    return Slope(median(slopes), rising / len(slopes))
