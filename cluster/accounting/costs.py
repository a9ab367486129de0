"""Cost per prefill token and per decode token, learned from measured intervals. Pure."""

from dataclasses import dataclass

import numpy as np

FORGETTING = 0.995
"""Weight of an interval relative to the next busy one; 200 intervals of 2 s are 7 minutes."""
IDLE_WEIGHT = 0.1
"""Weight of one idle interval in the moving average of the idle power."""
RIDGE = 1e-4
"""Regularization that pulls both costs together, relative to the observed tokens.

It decides if the intervals cannot: with one kind of token, or both in a constant proportion.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens computed by an engine."""

    prefill: float = 0.0
    """Prompt tokens that were not cached."""
    decode: float = 0.0


class TokenCosts:
    """Fit of effort = idle_power * seconds + prefill_cost * prefill + decode_cost * decode.

    Least squares with exponential forgetting; both costs are non-negative. The unit is that of the
    effort: joules, or CPU seconds if energy is not measured.
    """

    def __init__(self) -> None:
        self.prefill_cost = 1.0
        self.decode_cost = 1.0
        self.idle_power = 0.0
        """Effort per second without work."""
        self.known = False
        """True once the costs were learned; until then, each token costs 1."""
        # Normal equations of the fit: gram @ costs = moments.
        self._gram = np.zeros((2, 2))
        self._moments = np.zeros(2)

    def learn(self, seconds: float, work: Work, effort: float) -> None:
        """Add one interval: its length, the tokens computed and the effort measured."""
        if not (work.prefill or work.decode):
            if seconds > 0:
                self.idle_power += IDLE_WEIGHT * (effort / seconds - self.idle_power)
            return
        tokens = np.array([work.prefill, work.decode], float)
        busy_effort = max(0.0, effort - self.idle_power * seconds)
        self._gram = FORGETTING * self._gram + np.outer(tokens, tokens)
        self._moments = FORGETTING * self._moments + tokens * busy_effort
        self._solve()

    def estimate_effort(self, work: Work) -> float:
        """Return the effort of the work, idle power excluded."""
        return self.prefill_cost * work.prefill + self.decode_cost * work.decode

    def _solve(self) -> None:
        # The ridge makes the matrix positive definite as soon as there was one token.
        gram = self._gram + RIDGE * np.trace(self._gram) * np.array([[1.0, -1.0], [-1.0, 1.0]])
        if np.linalg.det(gram) <= 0:  # the sums have decayed to zero
            return
        costs = np.linalg.solve(gram, self._moments)
        if costs.min() < 0:  # a negative cost becomes 0, and the other one is fitted alone
            other = costs.argmax()
            costs = np.zeros(2)
            costs[other] = self._moments[other] / gram[other, other]
        if costs.any():
            self.prefill_cost, self.decode_cost = map(float, costs)
            self.known = True
