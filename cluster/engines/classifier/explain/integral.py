"""A line integral that knows its own error: the arithmetic of integrated gradients.

By the gradient theorem the integral of a score's slope along a path is the difference of the score
at its ends (Sundararajan et al., arXiv:1703.01365, "completeness"). That holds for every piece of
the path, so the pieces where the sum is off are the ones that need more points. Pure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NODES = 0.5 + 0.5 * np.array([-1.0, -np.sqrt(3 / 7), 0.0, np.sqrt(3 / 7), 1.0])
WEIGHTS = np.array([1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20])
"""Gauss-Lobatto quadrature of five points on [0, 1], exact up to degree 7. Its points include both
ends and the middle, which a piece's halves use again."""
TOLERANCE = 0.005
"""Share of a label's difference by which its sum may be off."""
FLOOR = 5e-4
"""The same as a share of the largest difference, for labels that hardly change."""
MAX_POINTS = 250

Evaluate = Callable[[Sequence[float]], tuple[Floats, Floats]]
"""From points on the path, 0 to 1, to the scores there, [points, labels], and their slopes along
the path by what moves, [points, labels, tokens]."""


@dataclass(frozen=True, slots=True)
class Integral:
    """What each token adds to each label's score on the way from the start to the end."""

    parts: Floats
    """[labels, tokens]"""
    start: Floats
    end: Floats
    """The scores at the ends, [labels]."""
    num_points: int

    @property
    def error(self) -> Floats:
        """By how much the parts' sum misses the difference of the scores, [labels]."""
        return np.asarray(self.parts.sum(1) - (self.end - self.start))


def integrate(evaluate: Evaluate, max_points: int = MAX_POINTS) -> Integral:
    """Integrate from 0 to 1, with more points where the sum is off, up to ``max_points``."""
    known: dict[float, tuple[Floats, Floats]] = {}
    pieces = [(0.0, 0.5), (0.5, 1.0)]
    while True:
        wanted = sorted({x for piece in pieces for x in _points(piece)} - known.keys())
        scores, slopes = evaluate(wanted)
        known.update(zip(wanted, zip(scores, slopes, strict=True), strict=True))
        parts = np.stack([_part(piece, known) for piece in pieces])
        gaps = np.abs(parts.sum(2) - np.stack([known[b][0] - known[a][0] for a, b in pieces]))
        start, end = known[0.0][0], known[1.0][0]
        difference = np.abs(end - start)
        allowed = TOLERANCE * difference + FLOOR * difference.max(initial=0.0)
        bad = (gaps > allowed / len(pieces)).any(1)
        enough = bool((gaps.sum(0) <= allowed).all())
        if enough or len(known) + 6 * bad.sum() > max_points:
            return Integral(parts.sum(0), start, end, len(known))
        cut = [_cut(piece, split) for piece, split in zip(pieces, bad, strict=True)]
        pieces = [piece for halves in cut for piece in halves]


def _points(piece: tuple[float, float]) -> list[float]:
    start, end = piece
    inner = [start + (end - start) * float(node) for node in NODES[1:-1]]
    return [start, *inner, end]


def _part(piece: tuple[float, float], known: dict[float, tuple[Floats, Floats]]) -> Floats:
    slopes = np.stack([known[x][1] for x in _points(piece)])
    return np.asarray((piece[1] - piece[0]) * np.tensordot(WEIGHTS, slopes, 1))


def _cut(piece: tuple[float, float], split: bool) -> list[tuple[float, float]]:
    start, end = piece
    middle = _points(piece)[2]
    return [(start, middle), (middle, end)] if split else [piece]
