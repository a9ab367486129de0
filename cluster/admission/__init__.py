"""Who is let in, and in which order: keys, limits, fair queueing, capacity. No Ray, clock or I/O.

Time is always an argument: seconds of a clock that only goes forward, and Unix time where a
limit is of a day.
"""

from cluster.admission.capacity import PoolCapacity
from cluster.admission.fair_queue import Entry, FairQueue, QueueLimits
from cluster.admission.identity import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    OPEN,
    Identity,
    Tenant,
    TenantLimits,
)
from cluster.admission.limits import Account, Refusal

__all__ = [
    "MAX_PRIORITY",
    "MIN_PRIORITY",
    "OPEN",
    "Account",
    "Entry",
    "FairQueue",
    "Identity",
    "PoolCapacity",
    "QueueLimits",
    "Refusal",
    "Tenant",
    "TenantLimits",
]
