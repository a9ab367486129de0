"""Correction of wait estimates by their past errors. Pure."""

from math import exp

# Decay per wait. Much slower than the queue turns over: at the same speed, queue length and
# correction oscillate together.
_DECAY = 0.996
_FORGET_S = 300.0  # time constant of forgetting, longer than the decay takes under load
_PRIOR_S = 1.0  # seconds of exact estimates that a new tenant starts with
_MAX_CORRECTION = 4.0


class WaitCorrection:
    """Actual relative to estimated waits of each tenant.

    The ratio is mostly above 1, because requests of other tenants keep arriving.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, float]] = {}  # actual, estimated, updated at

    def factor(self, tenant: str, now_s: float) -> float:
        """Return the factor by which to correct an estimate."""
        actual_s, estimated_s = self._decayed(tenant, now_s)
        return min(_MAX_CORRECTION, (_PRIOR_S + actual_s) / (_PRIOR_S + estimated_s))

    def learn(self, tenant: str, estimated_s: float, actual_s: float, now_s: float) -> None:
        """Learn from a wait that ended with a slot or at its deadline."""
        sums = self._decayed(tenant, now_s)
        self._sums[tenant] = (
            sums[0] * _DECAY + actual_s,
            sums[1] * _DECAY + estimated_s,
            now_s,
        )

    def _decayed(self, tenant: str, now_s: float) -> tuple[float, float]:
        actual_s, estimated_s, updated_s = self._sums.get(tenant, (0.0, 0.0, now_s))
        share = exp(-max(0.0, now_s - updated_s) / _FORGET_S)
        return actual_s * share, estimated_s * share
