"""Speed of each replica and accuracy of its cache claims, learned from finished requests.

A rate is a quotient of two decaying sums, so many small observations weigh as much as one large
one. A replica that suddenly becomes slow shows it with its first request, which contributes most of
the seconds.
"""

import numpy as np

from cluster.routing.replica_state import Placement
from cluster.routing.table import FloatArray
from cluster.usage import Usage

STEP_TOKENS = 64.0
"""Fixed cost of a prefill, in prompt tokens: an engine step has a price even if it computes little.
A guess between a CPU's (about 40) and a large GPU's (some hundreds)."""
PREFILL_PRIOR = 4000.0
"""Prompt tokens/s before anything was measured."""
STREAM_PRIOR = 30.0
"""Tokens/s of one stream before anything was measured."""
CLAIM_WEIGHT_TOKENS = 2000.0
"""Cached tokens that the trust in a replica's cache claims is worth before any was tested."""

DECAY = 0.95
"""Share of a sum that is kept at each observation: about the last 20 count."""
HALF_LIFE_S = 60.0
"""Time after which observations count half, so that a replica that was slow is tried again."""
MIN_OBSERVED = 5.0
"""Decayed number of observations from which a replica's rate is compared with that of others."""
MIN_RATE = 1e-3
"""Lower bound of a rate, because queued work is divided by it."""


class LearnedRates:
    """A quotient of sums for each row, drawn to a common prior while observations are few.

    ``rate = (numerators + weight * prior) / (denominators + weight)``

    If ``pooled``, the prior follows the median of the observed rates, which a minority of replicas
    that lie or are slow does not move.
    """

    def __init__(self, prior: float, weight: float, *, pooled: bool = True) -> None:
        self.prior = prior
        self._weight = weight
        self._pooled = pooled
        self._numerators = np.zeros(0)
        self._denominators = np.zeros(0)
        self._num_observed = np.zeros(0)
        self.values: FloatArray = np.zeros(0)
        """Rate of each row; read-only."""
        self.of_peers: FloatArray = np.zeros(0)
        """Median of the other rows' observed rates at the last refresh, per row; NaN if no other
        row has one; read-only."""

    def grow(self, size: int) -> None:
        new = np.zeros(size - len(self.values))
        self._numerators = np.concatenate((self._numerators, new))
        self._denominators = np.concatenate((self._denominators, new))
        self._num_observed = np.concatenate((self._num_observed, new))
        self.values = np.concatenate((self.values, new + self.prior))
        self.of_peers = np.concatenate((self.of_peers, new + np.nan))

    def reset_row(self, row: int) -> None:
        self._numerators[row] = self._denominators[row] = self._num_observed[row] = 0.0
        self.values[row] = self.prior

    def observe(self, row: int, numerator: float, denominator: float) -> None:
        """Add an observation; negative and non-finite numbers are ignored."""
        if not (0.0 <= numerator < np.inf and 0.0 <= denominator < np.inf):
            return
        self._numerators[row] = numerator = self._numerators[row] * DECAY + numerator
        self._denominators[row] = denominator = self._denominators[row] * DECAY + denominator
        self._num_observed[row] = self._num_observed[row] * DECAY + 1.0
        rate = (numerator + self._weight * self.prior) / (denominator + self._weight)
        self.values[row] = max(MIN_RATE, rate)

    def refresh(self, elapsed_s: float) -> None:
        """Let observations fade and update the prior; to be called about once a second."""
        keep = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._numerators *= keep
        self._denominators *= keep
        self._num_observed *= keep
        known = self._denominators > 0.25 * self._weight
        if self._pooled and known.any():
            median = float(np.median(self._numerators[known] / self._denominators[known]))
            self.prior = max(MIN_RATE, median)
        if self._pooled:
            self._compare()
        rates = (self._numerators + self._weight * self.prior) / (self._denominators + self._weight)
        np.maximum(rates, MIN_RATE, out=self.values)

    def _compare(self) -> None:
        """Update ``of_peers``; unlike the prior, it may rest on a few milliseconds."""
        known = (self._num_observed >= MIN_OBSERVED) & (self._denominators > 0.0)
        self.of_peers[:] = np.nan
        if known.any():
            observed = self._numerators[known] / self._denominators[known]
            self.of_peers[~known] = np.median(observed)
            self.of_peers[known] = medians_of_others(observed)


class ReplicaSpeeds:
    """Learned rates of all rows."""

    def __init__(self) -> None:
        self.prefill = LearnedRates(PREFILL_PRIOR, 1.0)
        """Prompt tokens/s, under the decode load that the replica has."""
        self.stream = LearnedRates(STREAM_PRIOR, 1.0)
        """Completion tokens/s of one stream."""
        self.cache_claims = LearnedRates(1.0, CLAIM_WEIGHT_TOKENS, pooled=False)
        """Cache claim accuracy: the share of the claimed tokens that were cached, 0 to 1."""
        self._all = (self.prefill, self.stream, self.cache_claims)

    def grow(self, size: int) -> None:
        for rates in self._all:
            rates.grow(size)

    def reset_row(self, row: int) -> None:
        for rates in self._all:
            rates.reset_row(row)

    def refresh(self, elapsed_s: float) -> None:
        for rates in self._all:
            rates.refresh(elapsed_s)

    def peers_s(self, row: int, work_tokens: float, completion_tokens: float) -> float:
        """Return the time in seconds that the other replicas would take; NaN if unknown."""
        # In this order, `max` returns a NaN.
        prefill_s = work_tokens / max(float(self.prefill.of_peers[row]), MIN_RATE)
        if completion_tokens <= 0:
            return prefill_s
        return prefill_s + completion_tokens / max(float(self.stream.of_peers[row]), MIN_RATE)

    def learn(self, placement: Placement, usage: Usage, now_s: float) -> None:
        row, completion_tokens = placement.replica.row, usage.completion_tokens
        if placement.cached_tokens > 0.0:
            found = min(float(usage.cached_tokens), placement.cached_tokens)
            self.cache_claims.observe(row, found, placement.cached_tokens)
        work_tokens = prefill_work_tokens(usage.prompt_tokens, usage.cached_tokens)
        whole_s = now_s - placement.begun_s
        if placement.is_first_token_seen and placement.prefilled_s is not None:
            decode_s = now_s - placement.prefilled_s
            completion_tokens -= 1
        else:  # only the whole is known: both phases are assumed to be equally late
            prefill_s = work_tokens / float(self.prefill.values[row])
            decode_s = completion_tokens / float(self.stream.values[row])
            decode_s *= whole_s / (prefill_s + decode_s)
        self.prefill.observe(row, work_tokens, whole_s - decode_s)
        if completion_tokens > 0:
            self.stream.observe(row, completion_tokens, decode_s)


def medians_of_others(values: FloatArray) -> FloatArray:
    """Return, for each value, the median of all others; NaN if there is no other."""
    num = len(values)
    if num < 2:
        return np.full(num, np.nan)
    ordered = np.sort(values)
    positions = np.searchsorted(ordered, values)
    # Without one value, those above it move down by one position.
    low, high = (num - 2) // 2, (num - 1) // 2
    below = ordered[low + (positions <= low)]
    above = ordered[high + (positions <= high)]
    medians: FloatArray = (below + above) / 2
    return medians


def prefill_work_tokens(prompt_tokens: float, cached_tokens: float) -> float:
    return max(0.0, prompt_tokens - cached_tokens) + STEP_TOKENS
