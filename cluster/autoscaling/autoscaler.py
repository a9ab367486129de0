"""The numbers of replicas of all pools together."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.plan import Budget, allocate
from cluster.autoscaling.pool import PoolScaler
from cluster.autoscaling.signals import PoolSignals, PoolSpec


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas one pool gets."""

    target: int
    wanted: int
    """Without the other pools."""
    cause: str
    """One word, for a metric."""
    reason: str
    """A sentence, for a log."""


@dataclass(frozen=True, slots=True)
class TargetChange:
    """A decision that changed a pool's target, for whoever asks later."""

    time: float
    """Unix time."""
    pool: str
    before: int
    target: int
    cause: str
    reason: str


class Autoscaler:
    """Decides for all pools of one application; keeps what it learned between the calls."""

    def __init__(self, specs: Mapping[str, PoolSpec], budget: Budget | None = None) -> None:
        self._specs = dict(specs)
        self._budget = budget or Budget()
        self._scalers = {name: PoolScaler(spec) for name, spec in specs.items()}

    @property
    def scalers(self) -> Mapping[str, PoolScaler]:
        """What is known of each pool."""
        return self._scalers

    def decide(self, now: float, signals: Mapping[str, PoolSignals]) -> dict[str, Decision]:
        """The decision for each pool that ``signals`` tells of, at ``now`` (seconds).

        Pools without signals keep what they have of the budget: their floor.
        """
        wants = {name: self._scalers[name].want(now, seen) for name, seen in signals.items()}
        wanted = {name: want.replicas for name, want in wants.items()}
        floors = {name: spec.min for name, spec in self._specs.items()}
        given = allocate({**floors, **wanted}, self._specs, self._budget)
        decisions = {}
        for name, want in wants.items():
            cause, reason = want.cause, want.reason
            if given[name] < min(want.replicas, self._specs[name].max):
                cause, reason = "budget", f"{reason}; the budget allows {given[name]}"
            decisions[name] = Decision(given[name], want.replicas, cause, reason)
        return decisions
