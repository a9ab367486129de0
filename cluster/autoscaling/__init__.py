"""Autoscaling: from signals of the pools to their numbers of replicas.

Pure: neither Ray nor a clock nor I/O; the time is an argument. ``Autoscaler`` is what the live
system, the simulator and the benchmark run alike.
"""

from cluster.autoscaling.autoscaler import Autoscaler, Decision, TargetChange
from cluster.autoscaling.capacity import Capacity
from cluster.autoscaling.forecast import Forecast
from cluster.autoscaling.plan import Budget, allocate
from cluster.autoscaling.signals import Objective, PoolSignals, PoolSpec

__all__ = [
    "Autoscaler",
    "Budget",
    "Capacity",
    "Decision",
    "Forecast",
    "Objective",
    "PoolSignals",
    "PoolSpec",
    "TargetChange",
    "allocate",
]
