"""A router's report on itself, for its own page and for the other routers' pages."""

import msgspec

from cluster.gateway.recording.request_log import Failure
from cluster.gateway.recording.tenant_seconds import PoolSecond
from cluster.routing.breaker import CircuitState


class Second(msgspec.Struct):
    """One second of one router."""

    time: int
    """Unix time of its beginning."""
    span_s: float
    """Actual duration in seconds."""
    pools: dict[str, PoolSecond]
    unrouted: int = 0
    """Requests rejected before a pool was selected, such as an unknown model or no API key."""
    tenants: dict[str, dict[str, PoolSecond]] = msgspec.field(default_factory=dict)
    """Requests of the most active tenants by pool; "" before a pool was selected."""

    def of_tenant(self, tenant: str) -> "Second":
        """Return the tenant's part of this second."""
        pools = self.tenants.get(tenant, {})
        unrouted = pools.get("", PoolSecond()).refused
        return Second(self.time, self.span_s, pools, unrouted)


class ReplicaNow(msgspec.Struct):
    """Current state of a replica."""

    id: str
    state: str
    in_flight: int = msgspec.field(name="ongoing")
    """Requests of the reporting router."""
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0
    circuit: CircuitState = "closed"
    """State of the circuit breaker; of several routers, the one that is furthest from closed."""
    is_draining: bool = False
    """True if it or its node drains."""


class PoolNow(msgspec.Struct):
    """Current state of a pool."""

    kind: str
    replicas: list[ReplicaNow]
    queued: int = 0
    """Requests in the reporting router's queue."""

    def level(self) -> PoolSecond:
        """Return the current levels, summed over the replicas."""
        return PoolSecond(
            in_flight=sum(replica.in_flight for replica in self.replicas),
            queued=self.queued,
            running=sum(replica.running for replica in self.replicas),
            waiting=sum(replica.waiting for replica in self.replicas),
            kv_cache=sum(replica.kv_cache for replica in self.replicas)
            / max(1, len(self.replicas)),
        )


class ReplicaChange(msgspec.Struct):
    """A change of the set of running replicas of a pool."""

    time: float
    """Unix time."""
    model: str
    added: list[str]
    """Ids of new replicas."""
    removed: list[str]
    """Ids of replicas that are gone."""
    replicas: int
    """Number of replicas after the change."""


class RouterReport(msgspec.Struct):
    """Everything that one router reports."""

    router: str
    seconds: list[Second]
    pools: dict[str, PoolNow]
    failures: list[Failure]
    changes: list[ReplicaChange]
