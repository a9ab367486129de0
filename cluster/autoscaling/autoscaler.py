"""Numbers of replicas of all pools together, within the budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.pool import PoolScaler
from cluster.autoscaling.signals import PoolSignals, PoolSpec

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """CPU cores and GPUs that all replicas together may use."""

    cpus: float = math.inf
    gpus: float = math.inf

    def minus(self, spec: PoolSpec, replicas: int = 1) -> "Budget":
        """Return the budget that is left after some replicas."""
        return Budget(self.cpus - spec.cpus * replicas, self.gpus - spec.gpus * replicas)

    @property
    def is_overdrawn(self) -> bool:
        """True if more was used than available."""
        return self.cpus < -_ROUNDING or self.gpus < -_ROUNDING


@dataclass(frozen=True, slots=True)
class Decision:
    """Number of replicas of one pool."""

    target: int
    wanted: int
    """Number that the pool would get if it were alone."""
    cause: str
    """One word, for a metric."""
    reason: str
    """A sentence, for a log."""


@dataclass(frozen=True, slots=True)
class TargetChange:
    """Record of a decision that changed a pool's target."""

    time: float
    """Unix time in seconds."""
    pool: str
    before: int
    target: int
    cause: str
    reason: str


class Autoscaler:
    """Decisions for all pools of one application; keeps what it learned between the calls."""

    def __init__(self, specs: Mapping[str, PoolSpec], budget: Budget | None = None) -> None:
        self._specs = dict(specs)
        self._budget = budget or Budget()
        self._scalers = {name: PoolScaler(spec) for name, spec in specs.items()}

    @property
    def scalers(self) -> Mapping[str, PoolScaler]:
        """The scaler of each pool."""
        return self._scalers

    def decide(self, now: float, signals: Mapping[str, PoolSignals]) -> dict[str, Decision]:
        """Return the decision for each pool in ``signals``, at ``now`` (seconds).

        Pools without signals keep their floor of the budget.
        """
        proposals = {name: self._scalers[name].propose(now, seen) for name, seen in signals.items()}
        wanted = {name: spec.min for name, spec in self._specs.items()}
        wanted |= {name: proposal.replicas for name, proposal in proposals.items()}
        targets = allocate(wanted, self._specs, self._budget)
        decisions = {}
        for name, proposal in proposals.items():
            target, cause, reason = targets[name], proposal.cause, proposal.reason
            if target < min(proposal.replicas, self._specs[name].max):
                cause, reason = "budget", f"{reason}; the budget allows {target}"
            decisions[name] = Decision(target, proposal.replicas, cause, reason)
        return decisions


def allocate(
    wanted: Mapping[str, int], specs: Mapping[str, PoolSpec], budget: Budget
) -> dict[str, int]:
    """Return the replicas of each pool, within its floor, its ceiling and the budget.

    Floors come first (the configuration guarantees that they fit). Each further replica goes to the
    pool with the highest priority that wants more; among equals, to the pool with the smallest
    share of what it wants.
    """
    targets = {name: spec.min for name, spec in specs.items()}
    for spec in specs.values():
        budget = budget.minus(spec, spec.min)
    limits = {name: spec.clamp(wanted[name]) for name, spec in specs.items()}
    unsatisfied = {name for name, limit in limits.items() if targets[name] < limit}
    while unsatisfied:
        name = min(unsatisfied, key=lambda n: (-specs[n].priority, targets[n] / limits[n], n))
        left = budget.minus(specs[name])
        if left.is_overdrawn:
            unsatisfied.discard(name)
            continue
        budget = left
        targets[name] += 1
        if targets[name] == limits[name]:
            unsatisfied.discard(name)
    return targets
