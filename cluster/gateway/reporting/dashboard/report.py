"""A router's report on itself, for its own page and for the other routers' pages."""

from collections.abc import Mapping

import msgspec

from cluster.gateway.recording.request_log import Failure
from cluster.metrics import table

LATENCIES: Mapping[str, table.Metric] = {
    "ttft": table.TTFT_SECONDS,
    "itl": table.ITL_SECONDS,
    "total": table.REQUEST_SECONDS,
    "queue": table.QUEUE_SECONDS,
}
"""Histograms whose percentiles the dashboard shows, by their names there."""


class PoolSecond(msgspec.Struct, omit_defaults=True):
    """One second of one pool in one router."""

    requests: int = 0
    """Requests that ended."""
    failed: int = 0
    """Requests with a status of 500 or above, or cut off."""
    refused: int = 0
    """Requests with a status of 400 to 498."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies: dict[str, dict[int, int]] = msgspec.field(default_factory=dict)
    """For each of ``LATENCIES``, the observations by bucket index."""
    in_flight: int = msgspec.field(default=0, name="ongoing")
    """Requests of this router at the end of the second."""
    queued: int = 0
    """Requests in this router's queue at the end of the second."""
    running: int = 0
    """Requests in the engines' batches, from all routers."""
    waiting: int = 0
    """Requests waiting in the engines, from all routers."""
    kv_cache: float = 0.0
    """Mean share of the KV caches in use."""


class Second(msgspec.Struct):
    """One second of one router."""

    time: int
    """Unix time of its beginning."""
    span_s: float
    """Actual duration in seconds."""
    pools: dict[str, PoolSecond]
    unrouted: int = 0
    """Requests rejected before a pool was selected, such as an unknown model or no API key."""


class ReplicaNow(msgspec.Struct):
    """Current state of a replica."""

    id: str
    state: str
    in_flight: int = msgspec.field(name="ongoing")
    """Requests of the reporting router."""
    running: int = 0
    waiting: int = 0
    kv_cache: float = 0.0


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
