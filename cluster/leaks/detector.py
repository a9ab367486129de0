"""Leak detection from samples of a process' memory and traffic. Pure.

A process leaks if its memory grows over a window and its traffic does not explain the growth. A
busier server rightly uses more memory, and a much quieter one may free some, so only pairs of
samples with similar, not growing traffic are compared.

The growth rate is the Theil-Sen slope, the median of the slopes between pairs of samples. It stays
near the truth even if 29 % of the samples are arbitrarily wrong, such as during a large batch
(P. K. Sen, JASA 63, 1968).

A KV cache on CPUs takes memory as its blocks are first used, for hours if traffic is low. Growth up
to the size of what a process has reserved in this way, its allowance, does not count.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cluster.config.operations import LeaksConfig

MIN_RISING = 0.8
"""Minimum share of rising pairs: noise around a level has half, a leak nearly all."""
MAX_TRAFFIC_DROP = 0.1
"""Maximum drop of traffic within a pair, as a share of the window's traffic range."""
MIN_FILLED = 0.9
"""Minimum share of the window that must be covered before a leak is reported."""
MAX_SAMPLES = 120
"""Samples compared; more are thinned out evenly, since the number of pairs grows quadratically."""


class MemorySample(NamedTuple):
    """Memory and traffic of a process at one moment."""

    at_s: float
    resident_bytes: float
    in_flight: float
    """Requests in flight."""


class Growth(NamedTuple):
    """Growth of a process' memory over the window."""

    bytes_per_s: float
    """0 while unknown."""
    leaking: bool


_UNKNOWN = Growth(0.0, False)


class LeakDetector:
    """Leak detector for one process.

    Args:
        config: Settings.
        allowance_bytes: Growth after ``settle_s`` that does not count.
    """

    def __init__(self, config: LeaksConfig, allowance_bytes: float = 0.0) -> None:
        self._config = config
        self._allowance_bytes = allowance_bytes
        self._settled_bytes: float | None = None
        self._samples: deque[MemorySample] = deque(
            maxlen=round(config.window_s / config.sample_s) + 1
        )
        self._first_s: float | None = None

    def add_sample(self, sample: MemorySample) -> Growth:
        """Add a sample, whose times must be monotonic, and return the growth over the window."""
        if self._first_s is None:
            self._first_s = sample.at_s
        if sample.at_s - self._first_s < self._config.settle_s:
            return _UNKNOWN
        self._samples.append(self._without_allowance(sample))
        slope = theil_sen_slope(self._samples)
        if slope is None:
            return _UNKNOWN
        covered_s = sample.at_s - self._samples[0].at_s
        leaking = (
            covered_s >= MIN_FILLED * self._config.window_s
            and slope.rising >= MIN_RISING
            and slope.bytes_per_s >= self._config.min_bytes_per_s
            and slope.bytes_per_s * covered_s >= self._config.min_growth_bytes
        )
        return Growth(slope.bytes_per_s, leaking)

    def _without_allowance(self, sample: MemorySample) -> MemorySample:
        if self._settled_bytes is None:
            self._settled_bytes = sample.resident_bytes
        grown = max(0.0, sample.resident_bytes - self._settled_bytes)
        allowed = min(grown, self._allowance_bytes)
        return sample._replace(resident_bytes=sample.resident_bytes - allowed)


class Slope(NamedTuple):
    """Theil-Sen slope of a series."""

    bytes_per_s: float
    """Median slope of the pairs."""
    rising: float
    """Share of the pairs that rise, 0 to 1; equal ones count half."""


def theil_sen_slope(samples: Sequence[MemorySample]) -> Slope | None:
    """Return the slope over pairs with similar traffic, or None if there are none."""
    # scipy.stats.theilslopes cannot leave out pairs.
    if not samples:
        return None
    step = -(-len(samples) // MAX_SAMPLES)
    times, memory, traffic = np.array(samples)[::step].T
    first, second = np.triu_indices(len(times), 1)
    elapsed, drop = times[second] - times[first], traffic[first] - traffic[second]
    max_drop = MAX_TRAFFIC_DROP * np.ptp(np.array([sample.in_flight for sample in samples]))
    chosen = (elapsed > 0) & (drop >= 0) & (drop <= max_drop)
    if not chosen.any():
        return None
    slopes = (memory[second] - memory[first])[chosen] / elapsed[chosen]
    return Slope(float(np.median(slopes)), float(np.mean((np.sign(slopes) + 1) / 2)))
