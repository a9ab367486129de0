"""Requests of one second: by pool, and by tenant for the dashboard's charts of a tenant."""

from bisect import bisect_left
from collections.abc import Mapping
from heapq import nlargest

import msgspec

from cluster.gateway.recording.request_log import CLIENT_DISCONNECTED
from cluster.metrics import table
from cluster.usage import Usage

LATENCIES: Mapping[str, table.Metric] = {
    "ttft": table.TTFT_SECONDS,
    "itl": table.ITL_SECONDS,
    "total": table.REQUEST_SECONDS,
    "queue": table.QUEUE_SECONDS,
}
"""Histograms whose percentiles the dashboard shows, by their names there."""
MAX_TENANTS = 32
"""Tenants of which a router keeps seconds: the most active ones."""
HALF_LIFE_S = 60.0
"""Time in which the activity of a tenant without requests halves, in seconds."""
_MIN_ACTIVITY = 0.01  # an older request is forgotten after 7 half-lives


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


class TenantSeconds:
    """Ended requests of the current second by tenant and pool ("" before a pool is selected).

    Per tenant there are no levels and no ITL, which is counted for open streams, too.
    """

    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._current: dict[str, dict[str, PoolSecond]] = {}
        self._activity: dict[str, float] = {}

    def count(
        self,
        tenant: str,
        pool: str,
        status: int,
        *,
        is_cut_off: bool = False,
        usage: Usage | None = None,
        latencies_s: Mapping[str, float | None] = {},
    ) -> None:
        """Count an ended request.

        Args:
            tenant: Its tenant; nothing is counted if keys are not configured.
            pool: Its pool.
            status: Status of the response.
            is_cut_off: True if the response ended before it was complete.
            usage: Its tokens, if known.
            latencies_s: Observations of ``LATENCIES``; None if not observed.
        """
        if not tenant:
            return
        second = self._current.setdefault(tenant, {}).setdefault(pool, PoolSecond())
        second.requests += 1
        second.failed += status >= 500 or is_cut_off
        second.refused += is_refused(status)
        if usage is not None:
            second.prompt_tokens += usage.prompt_tokens
            second.completion_tokens += usage.completion_tokens
        for name, latency_s in latencies_s.items():
            if latency_s is not None:
                bucket = bisect_left(LATENCIES[name].buckets, latency_s)
                buckets = second.latencies.setdefault(name, {})
                buckets[bucket] = buckets.get(bucket, 0) + 1

    def take(self, span_s: float) -> dict[str, dict[str, PoolSecond]]:
        """Return the seconds of the most active tenants, and begin the next one.

        Args:
            span_s: Time since the last call, in seconds.
        """
        current, self._current = self._current, {}
        decay = 0.5 ** (span_s / HALF_LIFE_S)
        activity = {
            tenant: decayed
            for tenant, value in self._activity.items()
            if (decayed := value * decay) > _MIN_ACTIVITY
        }
        for tenant, pools in current.items():
            requests = sum(second.requests for second in pools.values())
            activity[tenant] = activity.get(tenant, 0.0) + requests
        self._activity = activity
        if len(activity) <= self._max_tenants:
            return current
        shown = nlargest(self._max_tenants, activity, key=activity.__getitem__)
        return {tenant: current[tenant] for tenant in shown if tenant in current}


def is_refused(status: int) -> bool:
    """Return True if the status means that the request was refused."""
    return 400 <= status < CLIENT_DISCONNECTED
