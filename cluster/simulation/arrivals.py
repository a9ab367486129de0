"""Arrival times: a curve of the rate, and the burstiness of the gaps."""

import math
from collections.abc import Callable

import numpy as np

Curve = Callable[[float], float]
"""Rate at a time in seconds, in units of its mean."""

_GRID_S = 1.0  # resolution of the curve


def constant(_t: float) -> float:
    return 1.0


def daily(period_s: float, low: float = 0.2) -> Curve:
    """Return a cosine of one period, from ``low`` times the mean to 2 - ``low`` times."""
    return lambda t: 1.0 - (1.0 - low) * math.cos(2 * math.pi * t / period_s)


def bursts(rng: np.random.Generator, duration_s: float, factor: float = 4.0) -> Curve:
    """Return a curve with a burst of ``factor`` for a minute, about every ten minutes."""
    ends: list[tuple[float, float]] = []
    at = 0.0
    while at < duration_s:
        at += rng.exponential(540.0)
        length = rng.gamma(4.0, 15.0)
        ends.append((at, at + length))
        at += length
    bursts_s = sum(max(0.0, min(b, duration_s) - a) for a, b in ends)
    mean = 1.0 + (factor - 1.0) * bursts_s / duration_s

    def curve(t: float) -> float:
        return (factor if any(a <= t < b for a, b in ends) else 1.0) / mean

    return curve


def arrivals(
    rng: np.random.Generator, rate: float, duration_s: float, curve: Curve, shape: float = 1.0
) -> list[float]:
    """Return sorted arrival times in seconds.

    Time rescaling: arrivals of a unit-rate renewal process, mapped by the inverse of the expected
    number of arrivals. The gaps of that process have a gamma distribution; ``shape`` 1 is a Poisson
    process, below are bursts. ``rate`` is in requests/s.
    """
    grid = np.arange(0.0, duration_s + _GRID_S, _GRID_S)
    rates = np.array([max(0.0, rate * curve(float(t))) for t in grid[:-1]])
    expected = np.concatenate(([0.0], np.cumsum(rates * _GRID_S)))
    count = int(expected[-1] + 10 * math.sqrt(expected[-1] / shape) + 10)
    ticks = np.cumsum(rng.gamma(shape, 1.0 / shape, count))
    ticks = ticks[ticks < expected[-1]]
    times = np.interp(ticks, expected, grid)
    return [float(t) for t in times[times < duration_s]]
