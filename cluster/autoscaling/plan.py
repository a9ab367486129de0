"""What each pool gets where all together want more than there is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.autoscaling.signals import PoolSpec

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """What all replicas together may take."""

    cpus: float = math.inf
    gpus: float = math.inf

    def less(self, spec: PoolSpec, replicas: int = 1) -> "Budget":
        """What is left after so many replicas."""
        return Budget(self.cpus - spec.cpus * replicas, self.gpus - spec.gpus * replicas)

    @property
    def overdrawn(self) -> bool:
        """Whether more was taken than there was."""
        return self.cpus < -_ROUNDING or self.gpus < -_ROUNDING


def allocate(
    wanted: Mapping[str, int], specs: Mapping[str, PoolSpec], budget: Budget
) -> dict[str, int]:
    """The replicas that each pool gets: never below its floor, above its ceiling or the budget.

    Floors come first (the configuration guarantees that they fit). The rest goes to the highest
    priority that wants more; among equals, to the pool that has the least of what it wants.
    """
    given = {name: spec.min for name, spec in specs.items()}
    for spec in specs.values():
        budget = budget.less(spec, spec.min)
    limits = {name: s.bounded(wanted[name]) for name, s in specs.items()}
    hungry = {name for name, limit in limits.items() if given[name] < limit}
    while hungry:
        name = min(hungry, key=lambda n: (-specs[n].priority, given[n] / limits[n], n))
        left = budget.less(specs[name])
        if left.overdrawn:
            hungry.discard(name)
            continue
        budget = left
        given[name] += 1
        if given[name] == limits[name]:
            hungry.discard(name)
    return given
