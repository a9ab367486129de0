"""Routing policies: pure choices over snapshots of replicas. No Ray, no clock, no I/O."""

from cluster.routing.least_load import LeastLoad
from cluster.routing.policy import Policy, ReplicaView

__all__ = ["LeastLoad", "Policy", "ReplicaView"]
