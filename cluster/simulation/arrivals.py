"""When requests arrive: a curve of the rate, and how much arrivals clump."""

import math
from collections.abc import Callable

import numpy as np

Curve = Callable[[float], float]
"""The rate at a time in seconds, in units of its mean."""

_GRID_S = 1.0


def constant(_t: float) -> float:
    """Always the same."""
    return 1.0


def daily(period_s: float, low: float = 0.2) -> Curve:
    """Up and down once in ``period_s``, from ``low`` times the mean to 2 - ``low`` times."""
    return lambda t: 1.0 - (1.0 - low) * math.cos(2 * math.pi * t / period_s)


def bursts(rng: np.random.Generator, duration_s: float, factor: float = 4.0) -> Curve:
    """Times of about a minute with ``factor`` times as many arrivals, one in about ten minutes."""
    ends: list[tuple[float, float]] = []
    at = 0.0
    while at < duration_s:
        at += rng.exponential(540.0)
        length = rng.gamma(4.0, 15.0)
        ends.append((at, at + length))
        at += length
    mean = (
        1.0 + (factor - 1.0) * sum(max(0.0, min(b, duration_s) - a) for a, b in ends) / duration_s
    )

    def curve(t: float) -> float:
        return (factor if any(a <= t < b for a, b in ends) else 1.0) / mean

    return curve


def arrivals(
    rng: np.random.Generator, rate: float, duration_s: float, curve: Curve, shape: float = 1.0
) -> list[float]:
    """Arrival times in seconds, sorted.

    Args:
        rng: Where chance comes from.
        rate: The mean, in requests/s.
        duration_s: Times are below.
        curve: How the rate goes.
        shape: Of the gamma distribution of the gaps; 1: a Poisson process, less: bursts.
    """
    grid = np.arange(0.0, duration_s + _GRID_S, _GRID_S)
    rates = np.array([max(0.0, rate * curve(float(t))) for t in grid[:-1]])
    passed = np.concatenate(([0.0], np.cumsum(rates * _GRID_S)))
    count = int(passed[-1] + 10 * math.sqrt(passed[-1] / shape) + 10)
    ticks = np.cumsum(rng.gamma(shape, 1.0 / shape, count))
    ticks = ticks[ticks < passed[-1]]
    times = np.interp(ticks, passed, grid)
    return [float(t) for t in times[times < duration_s]]
