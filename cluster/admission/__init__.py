"""Admission: API keys, tenants' quotas, fair queueing, and the capacity of a pool's replicas.

No Ray, no clock, no I/O. Every time is an argument: seconds on a monotonic clock, and Unix time for
limits per day. Modules:

identity      tenant, its limits, and the rights of a key
keys          contents of a key file
limits        a tenant's quota at one router
leases        division of the quotas among routers
fair_queue    order in which queued requests are served
headroom      slots that a tenant with a backlog leaves to others
capacity      work that a router may have at a pool's replicas
wait_correction   correction of wait estimates by their past errors
"""

from cluster.admission.capacity import PoolCapacity
from cluster.admission.fair_queue import FairQueue, QueueEntry, QueueLimits, rank_of
from cluster.admission.headroom import MAX_BACKLOG, MAX_SHARE, RECENT_S, Headroom
from cluster.admission.identity import (
    ANONYMOUS,
    MAX_PRIORITY,
    MIN_PRIORITY,
    OPEN,
    Identity,
    Tenant,
    TenantLimits,
)
from cluster.admission.limits import Counted, QuotaRefusal, TenantQuota
from cluster.admission.wait_correction import WaitCorrection

__all__ = [
    "ANONYMOUS",
    "MAX_BACKLOG",
    "MAX_PRIORITY",
    "MAX_SHARE",
    "MIN_PRIORITY",
    "OPEN",
    "RECENT_S",
    "Counted",
    "FairQueue",
    "Headroom",
    "Identity",
    "PoolCapacity",
    "QueueEntry",
    "QueueLimits",
    "QuotaRefusal",
    "Tenant",
    "TenantLimits",
    "TenantQuota",
    "WaitCorrection",
    "rank_of",
]
