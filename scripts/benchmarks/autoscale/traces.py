"""Requests over hours: a day with its peak, and a base load with sudden bursts. Seeds are fixed.

Lengths are log-normal. Arrivals are a gamma renewal process that a rate modulates, as BurstGPT
(Wang et al., 2024) models bursts: a shape below 1 is burstier than Poisson's.
"""

from dataclasses import dataclass

import numpy as np

from cluster.simulation.arrivals import Curve, arrivals
from cluster.simulation.arrivals import daily as day
from cluster.simulation.requests import Trace, TraceRequest
from cluster.simulation.traces import GAMMA_SHAPE
from cluster.simulation.workloads import MOONCAKE_BLOCK, Lengths

HOUR_S = 3600.0
PROMPT = Lengths(2340.0, 0.7, 16_000.0)
"""Tokens; 3,000 of the mean, none of them shared."""
COMPLETION = Lengths(360.0, 0.8, 4000.0)
"""Tokens; 500 of the mean."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a rate goes."""

    curve: Curve
    """Requests/s at a time in seconds."""
    hours: float

    def trace(self, name: str, seed: int) -> Trace:
        """The requests of a seed."""
        rng = np.random.default_rng(seed)
        times = arrivals(rng, 1.0, self.hours * HOUR_S, self.curve, GAMMA_SHAPE)
        requests = [
            TraceRequest(at, 1 + round(PROMPT.draw(rng)), 1 + round(COMPLETION.draw(rng)))
            for at in times
        ]
        return Trace(name, requests, MOONCAKE_BLOCK)


def daily(mean: float = 5.0) -> Load:
    """A day that is quiet at night (a quarter of the mean) and has its peak in the afternoon."""
    curve = day(24 * HOUR_S, low=0.25)
    return Load(lambda t: mean * curve(t), 24.0)


def bursty(seed: int, hours: float = 12.0, base: float = 3.0) -> Load:
    """A base load, and bursts of up to five times it that rise in a minute and last minutes."""
    random = np.random.default_rng(seed)
    until = hours * HOUR_S
    bursts: list[tuple[float, float, float]] = []
    at = 0.0
    while (at := at + float(random.exponential(2400.0))) < until:
        bursts.append((at, float(random.uniform(240, 900)), float(random.uniform(1, 4)) * base))

    def height(burst: tuple[float, float, float], t: float) -> float:
        began, lasts, high = burst
        return high * max(0.0, min(1.0, (t - began) / 60, (began + lasts - t) / 60))

    return Load(lambda t: base + max((height(burst, t) for burst in bursts), default=0.0), hours)
