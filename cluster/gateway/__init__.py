"""Request handling of one router, independent of Ray.

``deployments.router`` feeds it the running replicas and serves it over HTTP and links. A request
passes, in this order:

1. ``asgi``: request id, authentication (``admission``), body;
2. ``gateway``: ``builtin`` answers the router's own paths; all others go on;
3. ``body`` and ``pools.selection``: the requested model, and its pool;
4. ``admission``: allowed models, quotas of the tenant, and the claim on the pool;
5. ``pools.relay``: takes a slot (``pools.queue``, ``pools.replica_set``), sends the request to the
   replica, and passes the response on as it grows;
6. ``recording``: metrics, traces, the request log, and usage.

Outside this path, ``reporting`` exports the state of the pools, and ``router_links`` connects
routers for ``reporting.dashboard`` and ``admission.quota_sync``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.gateway.admission.quota_sync import QuotaSync
    from cluster.gateway.asgi import GatewayApp
    from cluster.gateway.batches import BatchService
    from cluster.gateway.gateway import Gateway
    from cluster.gateway.messages import Request, Response
    from cluster.gateway.pools.replica import Answer, Opener, ReplicaInfo, Wiring
    from cluster.gateway.pools.rollout import Rollout
    from cluster.gateway.recording.usage import UsageAccount
    from cluster.gateway.reporting.usage_copies import UsageCopies
    from cluster.gateway.router_links import RouterLinks

_MODULES = {
    "Answer": "pools.replica",
    "BatchService": "batches",
    "Gateway": "gateway",
    "GatewayApp": "asgi",
    "Opener": "pools.replica",
    "QuotaSync": "admission.quota_sync",
    "ReplicaInfo": "pools.replica",
    "Request": "messages",
    "Response": "messages",
    "Rollout": "pools.rollout",
    "RouterLinks": "router_links",
    "UsageAccount": "recording.usage",
    "UsageCopies": "reporting.usage_copies",
    "Wiring": "pools.replica",
}
"""Module of each name; imported when the name is used, because a replica needs one of them only."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "Answer",
    "BatchService",
    "Gateway",
    "GatewayApp",
    "Opener",
    "QuotaSync",
    "ReplicaInfo",
    "Request",
    "Response",
    "Rollout",
    "RouterLinks",
    "UsageAccount",
    "UsageCopies",
    "Wiring",
]
