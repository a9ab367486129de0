"""How much one replica carries at the objectives, learned while it serves.

The latency of a queue or of a batch grows as 1 / (1 - load), so its inverse falls in a straight
line with the load: ``limit / latency = a - b * prefill - c * decode`` (tokens/s of one replica).
Three coefficients are fitted for each objective, older observations count less, and the line is
followed only a little beyond loads at which the objective was seen to hold.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.autoscaling.signals import Objective

HEADROOM = 0.9
"""The share of its limit that a latency is planned to take."""
MEMORY_S = 3600.0
MIN_SAMPLES = 20.0
"""Observations that a percentile must come from."""
MIN_POINTS = 6.0
"""Points that a fit must come from."""
EXPLORE = 1.25
"""How far beyond the proven load a replica may be planned by a fit."""
GROPE = 1.5
"""The same where nothing could be fitted yet."""
MAX_INVERSE = 10.0
"""Latencies far below the limit say little of where it is reached."""
SATURATED = 2.0
"""Latencies of so many limits are those of a queue that grows."""
SURPRISE = 0.95
"""What remains of the past when an objective is missed where the line says it holds."""
RIDGE = 1e-3

Fit = tuple[float, float, float]
"""``a, b, c`` of the line."""


@dataclass(slots=True)
class _Line:
    """A weighted least squares fit of one objective, by its sums alone."""

    scale: list[float] = field(default_factory=lambda: [1.0, 1e-9, 1e-9])
    """Features are divided by the largest that were seen, so that the sums are well scaled."""
    products: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    answers: list[float] = field(default_factory=lambda: [0.0] * 3)
    points: float = 0.0
    """Observations, of which older ones count less."""
    proven: tuple[float, float] = (0.0, 0.0)
    """The heaviest load of one replica (prefill, decode) at which the objective held."""

    def observe(self, prefill: float, decode: float, ratio: float, keep: float) -> None:
        """Take in one latency, in units of its limit."""
        y = min(MAX_INVERSE, 1 / ratio)
        before = self.fit()
        if ratio > SATURATED and before is not None and _at(before, prefill, decode) < y:
            return  # beyond saturation there is no line, only that it lies below
        if ratio > 1 and before is not None and _at(before, prefill, decode) > 1 / HEADROOM:
            keep *= SURPRISE
        self._add((1.0, prefill, decode), y, keep)
        self.proven = self.proven[0] * keep, self.proven[1] * keep
        fit = self.fit()
        if fit is None or ratio > 1:
            return
        if _loss(fit, prefill, decode) > _loss(fit, *self.proven):
            self.proven = prefill, decode

    def _add(self, x: Sequence[float], y: float, keep: float) -> None:
        for i, value in enumerate(x):
            if value > self.scale[i]:
                self._rescale(i, value)
        scaled = [value / scale for value, scale in zip(x, self.scale, strict=True)]
        # What matters is the line near the limit: there queues bend it down.
        weight = min(1.0, 1 / y**2)
        self.points = self.points * keep + 1
        for i in range(3):
            self.answers[i] = self.answers[i] * keep + weight * scaled[i] * y
            for j in range(3):
                self.products[i][j] = self.products[i][j] * keep + weight * scaled[i] * scaled[j]

    def _rescale(self, i: int, value: float) -> None:
        shrink = self.scale[i] / value
        self.scale[i] = value
        self.answers[i] *= shrink
        for j in range(3):
            self.products[i][j] *= shrink
            self.products[j][i] *= shrink

    def fit(self) -> Fit | None:
        """``a, b, c`` with b, c >= 0; None while too little was seen."""
        if self.points < MIN_POINTS:
            return None
        ridge = RIDGE * self.products[0][0]
        used = [0, 1, 2]
        while True:
            found = _solve(
                [[self.products[i][j] + (ridge if i == j else 0.0) for j in used] for i in used],
                [self.answers[i] for i in used],
            )
            rising = [i for i, value in zip(used, found, strict=True) if i and value > 0]
            if not rising:
                break
            used = [i for i in used if i not in rising]
        by_index = dict(zip(used, found, strict=True))
        return (
            by_index[0],
            -by_index.get(1, 0.0) / self.scale[1],
            -by_index.get(2, 0.0) / self.scale[2],
        )


@dataclass(frozen=True, slots=True)
class Need:
    """The replicas that one objective asks for."""

    replicas: float
    """What the fit says."""
    objective: str
    _fit: Fit
    _shown: float
    """What the most that a replica was seen to bear takes of the objective."""

    def proven(self, prefill: float, decode: float) -> float:
        """At how few replicas the load of each is near to one at which the objective held."""
        if self._shown <= 0:
            return math.inf
        return _loss(self._fit, prefill, decode) / (EXPLORE * self._shown)


class Capacity:
    """Learns from one pool. Knows nothing until it has seen the pool under load."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._good = (0.0, 0.0)
        """The most of each that a replica was seen to bear."""
        self._at: float | None = None

    def observe(
        self, now: float, prefill: float, decode: float, objectives: Iterable[Objective]
    ) -> None:
        """Take in latencies at a load in tokens/s of *one* replica, while nothing changes."""
        elapsed = 0.0 if self._at is None else min(max(0.0, now - self._at), MEMORY_S)
        self._at = now
        keep = math.exp(-elapsed / MEMORY_S)
        trusted = [o for o in objectives if o.samples >= MIN_SAMPLES and o.observed_s > 0]
        if trusted and all(objective.ratio <= 1 for objective in trusted):
            good = self._good
            self._good = max(good[0] * keep, prefill), max(good[1] * keep, decode)
        for objective in trusted:
            line = self._lines.setdefault(objective.name, _Line())
            line.observe(prefill, decode, objective.ratio, keep)

    def needed(self, prefill: float, decode: float) -> Need | None:
        """Replicas for a pool's tokens/s; None while nothing that limits was learned."""
        needs = [
            need
            for name, line in self._lines.items()
            if (need := _need(name, line, prefill, decode)) is not None
        ]
        return max(needs, key=lambda need: need.replicas, default=None)

    def least(self, prefill: float, decode: float) -> float:
        """Replicas that keep a replica's load near to what one was seen to bear; 0: not seen."""
        loads = [
            rate / good
            for rate, good in zip((prefill, decode), self._good, strict=True)
            if good > 0
        ]
        return max(loads, default=0.0) / GROPE


def _loss(fit: Fit, prefill: float, decode: float) -> float:
    return fit[1] * prefill + fit[2] * decode


def _at(fit: Fit, prefill: float, decode: float) -> float:
    return fit[0] - _loss(fit, prefill, decode)


def _need(name: str, line: _Line, prefill: float, decode: float) -> Need | None:
    fit = line.fit()
    if fit is None:
        return None
    loss = _loss(fit, prefill, decode)
    allowed = fit[0] - 1 / HEADROOM
    if loss <= 0 or allowed <= 0:  # it does not depend on the load, or cannot be met at any
        return None
    return Need(loss / allowed, name, fit, _loss(fit, *line.proven))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss elimination of a small positive definite system."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][k] * found[k] for k in range(i + 1, size))
        found[i] = (rows[i][size] - known) / rows[i][i]
    return found
