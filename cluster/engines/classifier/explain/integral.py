"""Adaptive line integral with an exact error: the arithmetic of integrated gradients. Pure.

By the gradient theorem, the integral of a score's slope along a path is the difference of the score
at its ends (Sundararajan et al., arXiv:1703.01365, "completeness"). This holds for every piece of
the path, so pieces whose sum is off are those that need more points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NODES = 0.5 + 0.5 * np.array([-1.0, -np.sqrt(3 / 7), 0.0, np.sqrt(3 / 7), 1.0])
WEIGHTS = np.array([1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20])
"""Five-point Gauss-Lobatto quadrature on [0, 1], exact up to degree 7. The halves of a piece reuse
its ends and its middle."""
TOLERANCE = 0.005
"""Accepted error of a label's sum, as a share of the label's difference."""
FLOOR = 5e-4
"""Accepted error as a share of the largest difference, for labels that hardly change."""
MAX_POINTS = 250
"""Limit on forward passes per explanation."""

Evaluate = Callable[[Sequence[float]], tuple[Floats, Floats]]
"""Maps points on the path, 0 to 1, to scores [points, labels] and each token's part of their slopes
along the path [points, labels, tokens]."""


@dataclass(frozen=True, slots=True)
class Integral:
    """Contribution of each token to the change of each label's score along the path."""

    parts: Floats
    """[labels, tokens]"""
    start: Floats
    """Scores at the start, [labels]."""
    end: Floats
    """Scores at the end, [labels]."""
    num_points: int

    @property
    def error(self) -> Floats:
        """Sum of the parts minus the difference of the scores, [labels]."""
        return np.asarray(self.parts.sum(1) - (self.end - self.start))


def integrate(evaluate: Evaluate, max_points: int = MAX_POINTS) -> Integral:
    """Integrate from 0 to 1, and add points to inaccurate pieces up to ``max_points``."""
    known: dict[float, tuple[Floats, Floats]] = {}
    pieces = [(0.0, 0.5), (0.5, 1.0)]
    while True:
        wanted = sorted({x for piece in pieces for x in _points(piece)} - known.keys())
        scores, slopes = evaluate(wanted)
        known.update(zip(wanted, zip(scores, slopes, strict=True), strict=True))
        parts = np.stack([_integrate_piece(piece, known) for piece in pieces])
        gaps = np.abs(parts.sum(2) - np.stack([known[b][0] - known[a][0] for a, b in pieces]))
        start, end = known[0.0][0], known[1.0][0]
        difference = np.abs(end - start)
        allowed = TOLERANCE * difference + FLOOR * difference.max(initial=0.0)
        bad = (gaps > allowed / len(pieces)).any(1)
        is_accurate = bool((gaps.sum(0) <= allowed).all())
        if is_accurate or len(known) + 6 * bad.sum() > max_points:  # a split adds 6 points
            return Integral(parts.sum(0), start, end, len(known))
        splits = zip(pieces, bad, strict=True)
        pieces = [half for piece, split in splits for half in (_halve(piece) if split else [piece])]


def _points(piece: tuple[float, float]) -> list[float]:
    start, end = piece
    inner = [start + (end - start) * float(node) for node in NODES[1:-1]]
    return [start, *inner, end]


def _integrate_piece(
    piece: tuple[float, float], known: dict[float, tuple[Floats, Floats]]
) -> Floats:
    slopes = np.stack([known[x][1] for x in _points(piece)])
    return np.asarray((piece[1] - piece[0]) * np.tensordot(WEIGHTS, slopes, 1))


def _halve(piece: tuple[float, float]) -> list[tuple[float, float]]:
    start, end = piece
    middle = _points(piece)[2]
    return [(start, middle), (middle, end)]
