"""Autoscaling policies: pure functions from load to a number of replicas."""

import math


def replicas_for(ongoing: float, target_per_replica: float) -> int:
    """Replicas at which each would serve ``target_per_replica`` of ``ongoing`` requests."""
    return math.ceil(ongoing / target_per_replica - 1e-9)
