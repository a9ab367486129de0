"""Numbers of replicas of all pools together, within the budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.pool import Decision, PoolScaler
from cluster.autoscaling.signals import PoolSignals, PoolSpec

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """CPU cores and GPUs that all replicas together may use."""

    cpus: float = math.inf
    gpus: float = math.inf

    def minus(self, spec: PoolSpec, replicas: int = 1) -> "Budget":
        return Budget(self.cpus - spec.cpus * replicas, self.gpus - spec.gpus * replicas)


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
        self.scalers = {name: PoolScaler(spec) for name, spec in specs.items()}

    def decide(self, now: float, signals: Mapping[str, PoolSignals]) -> dict[str, Decision]:
        """Return the decision for each pool in ``signals``, at ``now`` (seconds).

        Pools without signals keep their floor of the budget.
        """
        decisions = {name: self.scalers[name].decide(now, seen) for name, seen in signals.items()}
        wanted = {name: spec.min for name, spec in self._specs.items()}
        wanted |= {name: decision.wanted for name, decision in decisions.items()}
        for name, seen in signals.items():
            # A stale decision keeps the target, and so must the limit.
            if seen.core_limit is not None and decisions[name].cause != "stale":
                wanted[name] = min(wanted[name], seen.core_limit)
        targets = allocate(wanted, self._specs, self._budget)
        for name, alone in decisions.items():
            spec = self._specs[name]
            target, cause, reason = targets[name], alone.cause, alone.reason
            if target < spec.clamp(wanted[name]):
                cause, reason = "budget", f"{reason}; the budget allows {target}"
            elif target < spec.clamp(alone.wanted):
                cause, reason = "cores", f"{reason}; no free cores for another replica"
            decisions[name] = Decision(target, alone.wanted, cause, reason)
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
        if min(left.cpus, left.gpus) < -_ROUNDING:
            unsatisfied.discard(name)
            continue
        budget = left
        targets[name] += 1
        if targets[name] == limits[name]:
            unsatisfied.discard(name)
    return targets
