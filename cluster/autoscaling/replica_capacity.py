"""Load that one replica can bear within the objectives, learned while it serves.

The latency of a queue or a batch grows as 1 / (1 - load), so its inverse falls linearly with the
load. For each objective, weighted least squares fit the line::

    limit_s / latency_s = a - b * prefill - c * decode        (tokens/s of one replica; b, c >= 0)

Older observations count less. A fit is trusted only a little beyond the loads at which its
objective was seen to hold.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.autoscaling.signals import Objective

HEADROOM = 0.9
"""Share of its limit at which a latency is planned."""
MEMORY_S = 3600.0
"""Time constant with which observations lose weight."""
MIN_SAMPLES = 20.0
"""Observations that a percentile must be computed from."""
MIN_POINTS = 6.0
"""Latencies (weighted by age) that a fit must be computed from."""
EXPLORATION_WITH_FIT = 1.25
"""Load for which a replica may be planned, as a multiple of the proven load."""
EXPLORATION_WITHOUT_FIT = 1.5
"""The same multiple before there is a fit."""
MAX_INVERSE = 10.0
"""Cap of limit / latency: latencies far below the limit say little about where it is reached."""
SATURATED = 2.0
"""Latency, in units of the limit, from which a queue is assumed to be growing."""
SURPRISE = 0.95
"""Weight that the past keeps if an objective is missed where the fit says that it holds."""
RIDGE = 1e-3
"""Regularization, relative to the sum of the weights."""

_FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Line:
    """The fitted line of one objective."""

    at_zero: float
    prefill_slope: float
    decode_slope: float

    def drop(self, prefill: float, decode: float) -> float:
        """Return the fall of limit / latency from zero load to this load."""
        return self.prefill_slope * prefill + self.decode_slope * decode

    def at(self, prefill: float, decode: float) -> float:
        return self.at_zero - self.drop(prefill, decode)


@dataclass(slots=True)
class _ObjectiveFit:
    """Weighted least squares fit of one objective, by its normal equations."""

    # Features are (1, prefill, decode), divided by the largest values seen to scale the sums.
    scale: _FloatArray = field(default_factory=lambda: np.array([1.0, 1e-9, 1e-9]))
    products: _FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    """Weighted sum of feature * feature."""
    moments: _FloatArray = field(default_factory=lambda: np.zeros(3))
    """Weighted sum of feature * (limit / latency)."""
    points: float = 0.0
    """Observations, weighted by age."""
    proven: tuple[float, float] = (0.0, 0.0)
    """Heaviest load of one replica (prefill, decode) at which the objective held."""

    def observe(self, prefill: float, decode: float, ratio: float, keep: float) -> None:
        """Add a latency, in units of its limit, at a load in tokens/s of one replica.

        ``keep`` is the weight that all earlier observations keep.
        """
        inverse = min(MAX_INVERSE, 1 / ratio)
        before = self.line()
        if before is not None and ratio > SATURATED and before.at(prefill, decode) < inverse:
            return  # a growing queue's latency only shows that the line is below it
        if before is not None and ratio > 1 and before.at(prefill, decode) > 1 / HEADROOM:
            keep *= SURPRISE
        self._add(np.array([1.0, prefill, decode]), inverse, keep)
        self.proven = self.proven[0] * keep, self.proven[1] * keep
        line = self.line()
        if line is not None and ratio <= 1 and line.drop(prefill, decode) > line.drop(*self.proven):
            self.proven = prefill, decode

    def _add(self, features: _FloatArray, inverse: float, keep: float) -> None:
        scale = np.maximum(self.scale, features)
        shrink = self.scale / scale
        self.scale, scaled = scale, features / scale
        # The line matters near the limit; far below it, queues bend the curve.
        weight = min(1.0, 1 / inverse**2)
        self.points = self.points * keep + 1
        self.moments = self.moments * shrink * keep + weight * inverse * scaled
        products = self.products * np.outer(shrink, shrink)
        self.products = products * keep + weight * np.outer(scaled, scaled)

    def line(self) -> _Line | None:
        """Return the line; None if there are too few observations."""
        if self.points < MIN_POINTS:
            return None
        system = self.products + RIDGE * self.products[0, 0] * np.eye(3)
        used = [0, 1, 2]
        while True:
            solution = np.zeros(3)
            solution[used] = np.linalg.solve(system[np.ix_(used, used)], self.moments[used])
            # A latency cannot fall with the load: drop such a feature and solve again.
            rising = [i for i in used if i and solution[i] > 0]
            if not rising:
                break
            used = [i for i in used if i not in rising]
        at_zero, prefill_slope, decode_slope = (solution / self.scale).tolist()
        return _Line(at_zero, -prefill_slope, -decode_slope)


@dataclass(frozen=True, slots=True)
class ObjectiveRequirement:
    """Number of replicas that the hardest objective requires."""

    replicas: float
    """Number by the fit."""
    objective: str
    _line: _Line
    _proven_drop: float

    def proven_replicas(self, prefill: float, decode: float) -> float:
        """Return the fewest replicas whose load is near one at which the objective held."""
        if self._proven_drop <= 0:
            return math.inf
        return self._line.drop(prefill, decode) / (EXPLORATION_WITH_FIT * self._proven_drop)


class ReplicaCapacity:
    """Learned capacity of one pool's replicas; unknown until the pool was seen under load."""

    def __init__(self) -> None:
        self._fits: dict[str, _ObjectiveFit] = {}
        # Highest prefill and decode rate of a replica at which all objectives held.
        self._proven_rates = (0.0, 0.0)
        self._observed_at: float | None = None

    def observe(
        self, now: float, prefill: float, decode: float, objectives: Iterable[Objective]
    ) -> None:
        """Learn from the objectives at a load in tokens/s of *one* replica in a steady state."""
        last = now if self._observed_at is None else self._observed_at
        self._observed_at = now
        keep = math.exp(-min(max(0.0, now - last), MEMORY_S) / MEMORY_S)
        trusted = [o for o in objectives if o.samples >= MIN_SAMPLES and o.observed_s > 0]
        if trusted and all(objective.ratio <= 1 for objective in trusted):
            proven = self._proven_rates
            self._proven_rates = max(proven[0] * keep, prefill), max(proven[1] * keep, decode)
        for objective in trusted:
            fit = self._fits.setdefault(objective.name, _ObjectiveFit())
            fit.observe(prefill, decode, objective.ratio, keep)

    def required(self, prefill: float, decode: float) -> ObjectiveRequirement | None:
        """Return the replicas for a pool's tokens/s; None if no limiting objective was learned."""
        found = [_requirement(name, fit, prefill, decode) for name, fit in self._fits.items()]
        known = [each for each in found if each is not None]
        return max(known, key=lambda each: each.replicas, default=None)

    def proven_replicas(self, prefill: float, decode: float) -> float:
        """Return the fewest replicas whose load is near one seen without a missed objective.

        Used before there is a fit; 0 if nothing was seen.
        """
        return relative_load((prefill, decode), self._proven_rates) / EXPLORATION_WITHOUT_FIT


def relative_load(rates: tuple[float, float], reference: tuple[float, float]) -> float:
    """Return the higher ratio of the two rates to their reference; 0 if both of these are 0."""
    ratios = [rate / known for rate, known in zip(rates, reference, strict=True) if known > 0]
    return max(ratios, default=0.0)


def _requirement(
    name: str, fit: _ObjectiveFit, prefill: float, decode: float
) -> ObjectiveRequirement | None:
    line = fit.line()
    if line is None:
        return None
    drop = line.drop(prefill, decode)
    allowed = line.at_zero - 1 / HEADROOM  # of one replica
    if drop <= 0 or allowed <= 0:  # independent of the load, or missed at any load
        return None
    return ObjectiveRequirement(drop / allowed, name, line, line.drop(*fit.proven))
