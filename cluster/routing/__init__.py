"""Routing policies: pure choices over what a router knows of its replicas.

``Fleet`` and ``PrefixIndex`` are kept up to date by events and told the time; a ``Policy`` reads
them. No Ray, no clock, no I/O.
"""

from cluster.routing.estimate import TokenEstimate
from cluster.routing.fingerprint import Fingerprint, fingerprint
from cluster.routing.fleet import Fleet
from cluster.routing.make import make_policy
from cluster.routing.placement import Placement
from cluster.routing.policy import Policy
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.request import RequestView
from cluster.routing.slots import Reach
from cluster.usage import Usage

__all__ = [
    "Fingerprint",
    "Fleet",
    "Placement",
    "Policy",
    "PrefixIndex",
    "Reach",
    "RequestView",
    "TokenEstimate",
    "Usage",
    "fingerprint",
    "make_policy",
]
