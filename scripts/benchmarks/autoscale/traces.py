"""Requests over hours: a day with its peak, and a base load with sudden bursts. Seeds are fixed.

Lengths are log-normal. Arrivals are a gamma renewal process that a rate modulates, as BurstGPT
(Wang et al., 2024) models bursts: a shape below 1 is burstier than Poisson's.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int


Rate = Callable[[float], float]
"""Requests/s at a time in seconds."""
Trace = tuple[Rate, float]
"""A rate and how long it lasts in seconds."""


def daily(days: float = 1.0, mean: float = 9.0) -> Trace:
    """A day that is quiet at night (a quarter of the mean) and has its peak in the afternoon."""

    def rate(t: float) -> float:
        return mean * (1 - 0.75 * math.cos(2 * math.pi * t / (24 * HOUR_S)))

    return rate, 24 * HOUR_S * days


def bursty(hours: float = 12.0, base: float = 4.5, seed: int = 7) -> Trace:
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

    by_second = [
        base + max((height(burst, t) for burst in bursts), default=0.0) for t in range(int(until))
    ]
    return lambda t: by_second[int(t)], until


def arrivals(trace: Trace, seed: int, shape: float = 0.5) -> Iterator[Arrival]:
    """The requests of a trace, in order; ``shape`` of the gamma process, 1 is Poisson's."""
    rate, until = trace
    random = np.random.default_rng(seed)
    at = 0.0
    while True:
        count = 4096
        gaps = random.gamma(shape, 1 / shape, count).tolist()
        prompts = random.lognormal(math.log(1500) - 0.245, 0.7, count).astype(int).tolist()
        completions = random.lognormal(math.log(250) - 0.32, 0.8, count).astype(int).tolist()
        for gap, prompt, completion in zip(gaps, prompts, completions, strict=True):
            at += gap / rate(at)
            if at >= until:
                return
            yield Arrival(at, min(1 + prompt, 16_000), min(1 + completion, 4_000))
