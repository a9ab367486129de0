"""One pool as a router sees it: its limits, its queue and its replicas.

Calls go one way: a request takes its slot from the queue, the queue from the replica set. The
replica set reports changes to the queue by callbacks, which this module connects.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from cluster.admission import PoolCapacity
from cluster.config.applications import APPLICATION_PATHS
from cluster.engines.classifier.paths import PATHS as CLASSIFIER_PATHS
from cluster.engines.vllm.routes import ROUTES as VLLM_ROUTES
from cluster.gateway.messages import Headers, Request
from cluster.gateway.pools.delegation import caller_headers
from cluster.gateway.pools.hedger import Hedger
from cluster.gateway.pools.moving import move_answers
from cluster.gateway.pools.queue import AdmissionQueue
from cluster.gateway.pools.replica import Replica, ReplicaInfo, Wiring
from cluster.gateway.pools.replica_set import PoolLimits, ReplicaSet
from cluster.gateway.pools.retry_budget import RetryBudget
from cluster.gateway.pools.routes import OTHER, RouteTable
from cluster.gateway.pools.slots import Claim
from cluster.gateway.recording.observer import PoolMeter
from cluster.routing import TokenEstimator

PoolKind = Literal["generator", "classifier", "application"]

# A classifier builds its next batches from the requests that wait; the batch of a language model
# takes in a new request whenever one ends.
WAITING_RATIO: Mapping[PoolKind, float] = {
    "generator": 0.25,
    "classifier": 2.0,
    "application": 1.0,
}
"""Requests that may wait in the engines for each one that runs."""

_KIND_ROUTES: Mapping[PoolKind, RouteTable] = {
    "generator": RouteTable(path for _, path in VLLM_ROUTES),
    "classifier": RouteTable(CLASSIFIER_PATHS),
    "application": RouteTable(APPLICATION_PATHS),
}
"""Paths that the engines of some pool of a kind serve."""


class Pool:
    """The replicas of one deployment and the queue in front of them."""

    def __init__(
        self, name: str, kind: PoolKind, limits: PoolLimits, wiring: Wiring, meter: PoolMeter
    ) -> None:
        self.name = name
        self.kind: PoolKind = kind
        self.limits = limits
        self.meter = meter
        self.routes = RouteTable()
        """Paths that the running replicas serve; empty until one has described itself."""
        self._known_routes = self.routes  # the last that were not empty
        self.estimator = TokenEstimator(generates=kind == "generator")
        self.retries = RetryBudget(limits.max_in_flight)
        self.hedger = Hedger(limits.hedge_share)
        self.replicas = ReplicaSet(name, limits, wiring, meter)
        capacity = PoolCapacity(WAITING_RATIO[kind])
        self.queue = AdmissionQueue(name, limits.queue, capacity, self.replicas, meter)
        self.replicas.on_change = self.queue.dispatch
        self.replicas.on_load = self.queue.observe_loads
        self.replicas.on_leaving = self._move_answers
        self._movers: set[asyncio.Task[None]] = set()
        self._closed = False
        self._set_context(())

    @property
    def models(self) -> tuple[str, ...]:
        """Names that clients may use as ``model``: the pool's, its aliases, and its adapters'.

        None of applications, whose requests name the model that they call.
        """
        if self.kind == "application":
            return ()
        return (self.name, *self.limits.aliases, *self.limits.adapters)

    def set_limits(self, limits: PoolLimits) -> None:
        """Apply changed settings; requests that are queued or in flight stay."""
        self.limits = limits
        self.retries.set_min_retries(limits.max_in_flight)
        self.hedger.max_share = limits.hedge_share
        self.queue.set_limits(limits.queue)
        self.replicas.set_limits(limits)
        self.queue.dispatch()

    @property
    def num_in_flight(self) -> int:
        """Requests that this router sent to the running replicas and that have not ended."""
        return sum(replica.in_flight for replica in self.replicas.running)

    @property
    def num_queued(self) -> int:
        """Requests that wait in this router for a slot."""
        return len(self.queue)

    @property
    def is_asleep(self) -> bool:
        """True if the pool is scaled to zero; the next request starts a replica."""
        return self.limits.start_timeout_s is not None and not self.replicas

    @property
    def queue_timeout_s(self) -> float:
        """Longest wait for a slot, in seconds, of a request that arrives now."""
        limits = self.limits
        return (self.is_asleep and limits.start_timeout_s) or limits.queue_timeout_s

    def renew_claim(self, claim: Claim) -> Claim:
        """Return the claim for another attempt, which may wait as long as a new request."""
        expires_s = asyncio.get_running_loop().time() + self.queue_timeout_s
        return replace(claim, expires_s=min(expires_s, claim.deadline_s), is_retry=True, joins=None)

    def names_of(self, model: str) -> tuple[str, ...]:
        """Return all names of a model of this pool; the first one is in metrics and logs."""
        return (model,) if model in self.limits.adapters else (self.name, *self.limits.aliases)

    def needs_adapter(self, model: str) -> str | None:
        """Return the adapter to route by; None if every replica holds all adapters at once."""
        adapters = self.limits.adapters
        return model if model in adapters and len(adapters) > self.limits.max_loras else None

    def serves(self, path: str) -> bool | None:
        """Return whether the engines have this path; None if that depends on a missing replica."""
        if self.routes:
            return self.routes.find(path) is not None
        return None if _KIND_ROUTES[self.kind].find(path) is not None else False

    def route_of(self, path: str) -> str:
        """Return the route of a path for metrics and logs, also while no replica runs."""
        return self._known_routes.find(path) or OTHER

    def caller_headers(self, request: Request, claim: Claim) -> Headers:
        """Return the headers that let an application call models on behalf of the sender."""
        if self.kind != "application":
            return []
        return caller_headers(request.headers, claim.identity, claim.priority)

    def status(self) -> dict[str, Any]:
        """Return the pool's entry in the body of ``GET /ready``."""
        return {
            "kind": self.kind,
            "replicas": len(self.replicas),
            "ready": self.replicas.num_ready,
            "asleep": self.is_asleep,
            "queued": self.num_queued,
            "in_flight": self.num_in_flight,
            "ongoing": self.num_in_flight,  # deprecated name of in_flight
            "running": sum(load.running for load in self.replicas.loads),
            "adapters": {name: self._adapter_status(name) for name in self.limits.adapters},
        }

    def _adapter_status(self, adapter: str) -> dict[str, Any]:
        """Return the replicas that serve an adapter, and why others cannot."""
        replicas = self.replicas.running
        reports = [each.adapters for each in replicas if each.adapters is not None]
        return {
            "replicas": sum(not each.lacks_adapter(adapter) for each in replicas),
            "errors": sorted({r.failed[adapter] for r in reports if adapter in r.failed}),
        }

    def update(self, running: Iterable[ReplicaInfo]) -> None:
        """Set the running replicas."""
        infos = {} if self._closed else {info.id: info for info in running}
        self.replicas.update(infos)
        self.routes = RouteTable(route for info in infos.values() for route in info.routes)
        self._known_routes = self.routes or self._known_routes
        self._set_context(infos.values())
        self.queue.dispatch()

    def _set_context(self, infos: Iterable[ReplicaInfo]) -> None:
        known = [info.context_tokens for info in infos if info.context_tokens is not None]
        context_tokens = max(known, default=self.limits.context_tokens)
        self.estimator.context_tokens = context_tokens or float("inf")

    def _move_answers(self, replica: Replica) -> None:
        """Move the answers of a replica that drains or hangs, as slots become free elsewhere."""
        if self._closed or replica.mover is not None or not replica.movable:
            return
        replica.mover = asyncio.ensure_future(move_answers(replica, self.queue))
        self._movers.add(replica.mover)
        replica.mover.add_done_callback(partial(self._on_moved, replica))

    def _on_moved(self, replica: Replica, mover: asyncio.Task[None]) -> None:
        self._movers.discard(mover)
        replica.mover = None

    async def close(self) -> None:
        """Reject the requests that wait, and close every link."""
        self._closed = True
        for mover in self._movers:
            mover.cancel()
        self.queue.close()
        self.update(())
        await self.replicas.close()
