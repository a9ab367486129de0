"""Autoscaling: the number of replicas of each pool, from signals about its load.

No Ray, no clock, no I/O; the time is an argument. The live system, the simulator and the benchmark
run the same ``Autoscaler``. Modules:

signals            state of a pool at one moment, and its specification
autoscaler         decisions for all pools together, within the budget
pool               replicas that one pool requires, and why
forecast           prediction of a rate one start-up ahead
replica_capacity   load that a replica can bear within the objectives
starts             duration of start-ups
reports            load reports of routers, as Ray Serve carries them
settings           a deployment's part of the configuration, as Ray Serve carries it
"""

from cluster.autoscaling.autoscaler import Autoscaler, Budget, TargetChange, allocate
from cluster.autoscaling.forecast import Forecast
from cluster.autoscaling.pool import Decision
from cluster.autoscaling.signals import Objective, PoolSignals, PoolSpec

__all__ = [
    "Autoscaler",
    "Budget",
    "Decision",
    "Forecast",
    "Objective",
    "PoolSignals",
    "PoolSpec",
    "TargetChange",
    "allocate",
]
