"""The gateway: what the router does with a request, without Ray.

parse → authenticate → pick the pool → admit → choose a replica → relay. It owns the links and
the queues of one router, and must not know Ray Serve: ``deployments.router`` feeds it the running
replicas and drives it from HTTP and from handles.
"""

from cluster.gateway.admission.quota_sync import QuotaSync
from cluster.gateway.asgi import GatewayApp
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.pool import Answer, Opener, ReplicaInfo, Wiring
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.router_links import RouterLinks

__all__ = [
    "Answer",
    "Gateway",
    "GatewayApp",
    "Opener",
    "QuotaSync",
    "ReplicaInfo",
    "Request",
    "Response",
    "RouterLinks",
    "UsageAccount",
    "Wiring",
]
