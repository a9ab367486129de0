"""Request traces of several hours: a day with a peak, and a base load with bursts. Fixed seeds.

Lengths are log-normal. Arrivals are a gamma renewal process modulated by a rate, as BurstGPT (Wang
et al., 2024) models bursts: a shape below 1 is burstier than a Poisson process.
"""

from dataclasses import dataclass

import numpy as np

from cluster.simulation.arrivals import Curve, arrivals
from cluster.simulation.arrivals import daily as daily_curve
from cluster.simulation.requests import Trace, TraceRequest
from cluster.simulation.trace_files import MOONCAKE_BLOCK
from cluster.simulation.traces import GAMMA_SHAPE
from cluster.simulation.workloads import Lengths

HOUR_S = 3600.0
PROMPT = Lengths(2340.0, 0.7, 16_000.0)
"""Prompt tokens; the mean is 3,000. Prompts share no prefix."""
COMPLETION = Lengths(360.0, 0.8, 4000.0)
"""Completion tokens; the mean is 500."""


@dataclass(frozen=True, slots=True)
class RateCurve:
    """Arrival rate over time."""

    curve: Curve
    """Requests/s at a time in seconds."""
    hours: float

    def make_trace(self, name: str, seed: int) -> Trace:
        """Draw the requests for a seed."""
        rng = np.random.default_rng(seed)
        times = arrivals(rng, 1.0, self.hours * HOUR_S, self.curve, GAMMA_SHAPE)
        requests = [
            TraceRequest(at, 1 + round(PROMPT.draw(rng)), 1 + round(COMPLETION.draw(rng)))
            for at in times
        ]
        return Trace(name, requests, MOONCAKE_BLOCK)


def daily(mean: float = 5.0) -> RateCurve:
    """Return a day with a quarter of the mean rate at night and a peak in the afternoon."""
    curve = daily_curve(24 * HOUR_S, low=0.25)
    return RateCurve(lambda t: mean * curve(t), 24.0)


def bursty(seed: int, hours: float = 12.0, base: float = 3.0) -> RateCurve:
    """Return a base rate with bursts: up to five times the base, a minute to rise, minutes long."""
    rng = np.random.default_rng(seed)
    until = hours * HOUR_S
    bursts: list[tuple[float, float, float]] = []
    at = 0.0
    while (at := at + float(rng.exponential(2400.0))) < until:
        bursts.append((at, float(rng.uniform(240, 900)), float(rng.uniform(1, 4)) * base))

    def height(burst: tuple[float, float, float], t: float) -> float:
        began, duration, peak = burst
        return peak * max(0.0, min(1.0, (t - began) / 60, (began + duration - t) / 60))

    return RateCurve(
        lambda t: base + max((height(burst, t) for burst in bursts), default=0.0), hours
    )
