"""Routing: the choice of a replica for each request. No Ray, no clock, no I/O.

A ``Fleet`` (load and speed of a pool's replicas) and a ``PrefixIndex`` (contents of their prefix
caches) are kept up to date by events; a ``Policy`` reads them. Reading order:

request           view of a request, and the estimate of its tokens
fingerprint       decoding of a request's body, and prefix hashes of its prompt
fleet             events of the replicas; uses replica_state, rates (learned speeds), adapters
table             numbers of all replicas that a decision reads, as arrays
prefix_index      cached prefixes of all replicas
breaker           circuit breakers, which take out slow and failing replicas
guard             connects the fleet with its circuit breakers and with draining nodes
policy            interface and names of the policies in the ``*_policy`` modules
"""

from cluster.routing.breaker import BreakerLimits, Circuit
from cluster.routing.fingerprint import Fingerprint, RequestBody, decode_body, fingerprint
from cluster.routing.fleet import Fleet
from cluster.routing.guard import FleetGuard
from cluster.routing.policy import Policy, make_policy
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.replica_state import Placement
from cluster.routing.request import RequestView, TokenEstimator
from cluster.routing.table import Reach

__all__ = [
    "BreakerLimits",
    "Circuit",
    "Fingerprint",
    "Fleet",
    "FleetGuard",
    "Placement",
    "Policy",
    "PrefixIndex",
    "Reach",
    "RequestBody",
    "RequestView",
    "TokenEstimator",
    "decode_body",
    "fingerprint",
    "make_policy",
]
