"""``POST /drain``: take a replica, or all replicas of a node, out of service.

A replica is drained by itself: it tells every router, finishes or hands over its answers, and has
Ray Serve replace it. A node is drained by Ray; Serve then moves its replicas to other nodes, and
the routers stop using them once there are others.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs

from cluster.errors import (
    InvalidRequestError,
    LinkError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from cluster.gateway.messages import (
    Request,
    Response,
    header,
    json_response,
    require_operator,
)
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.replica import REPLICA_DRAIN_PATH, Replica
from cluster.gateway.router_links import RouterLinks
from cluster.link import RequestHead

DRAIN_PATH = "/drain"
REPLICA_TIMEOUT_S = 5.0
MIN_PREFIX_CHARS = 3
_MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A live node of the Ray cluster."""

    id: str
    ip: str
    is_head: bool


class NodeDrains:
    """Drains of Ray nodes; without Ray there is no node."""

    async def list_nodes(self) -> list[NodeInfo]:
        """Return the live nodes.

        Raises:
            UnavailableError: Ray does not answer.
        """
        return []

    async def drain(self, node: NodeInfo) -> None:
        """Have Ray drain a node.

        Raises:
            UnavailableError: Ray does not answer, or refuses.
        """


@dataclass(frozen=True, slots=True)
class _Target:
    """Something whose id or address may be what the operator means."""

    kind: Literal["replica", "router", "node"]
    id: str
    found: "tuple[Pool, Replica] | NodeInfo | None" = None


class Drains:
    """Handler of ``POST /drain``."""

    def __init__(
        self, pools: Mapping[str, Pool], routers: RouterLinks | None, nodes: NodeDrains
    ) -> None:
        self._pools = pools
        self._routers = routers
        self._nodes = nodes

    async def handle(self, request: Request) -> Response:
        """Drain the replica or node that the parameter ``target`` names.

        Raises:
            PermissionDeniedError: The key is not an operator's.
            InvalidRequestError: The target is missing, ambiguous, or must not be drained.
            NotFoundError: There is no such replica or node.
            UnavailableError: The replica or Ray does not answer.
        """
        require_operator(request, DRAIN_PATH)
        # Pages of other sites cannot send this type without the consent of the router.
        kind = (header(request.headers, b"content-type") or "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequestError(f"{DRAIN_PATH} needs `content-type: application/json`.")
        (name,) = parse_qs(request.query.decode("latin-1")).get("target", [""])[-1:]
        if not name:
            raise InvalidRequestError("target is missing: a replica or node.", param="target")
        target = await self._find(name)
        if isinstance(target.found, NodeInfo):
            return await self._drain_node(target.found)
        if target.found is None:
            raise InvalidRequestError(
                f"{target.id} is a router. Routers are replaced by a rolling update.",
                param="target",
            )
        return await _drain_replica(*target.found)

    async def _find(self, name: str) -> _Target:
        targets = [
            *(
                _Target("replica", replica.info.id, (pool, replica))
                for pool in self._pools.values()
                for replica in pool.replicas.running
            ),
            *(_Target("router", id_) for id_ in self._router_ids()),
        ]
        matches = [each for each in targets if each.id == name]
        if matches:  # without Ray, which may not answer
            return matches[0]
        for node in await self._nodes.list_nodes():
            targets += [_Target("node", node.id, node), _Target("node", node.ip, node)]
        matches = [each for each in targets if each.id == name]
        if not matches and len(name) >= MIN_PREFIX_CHARS:
            # Addresses are complete, because one is often the beginning of another.
            matches = [each for each in targets if each.id.startswith(name) and "." not in each.id]
        if not matches:
            raise NotFoundError(
                f"There is no replica or node {name!r}. `tandem status` lists them; a prefix needs "
                f"{MIN_PREFIX_CHARS} characters."
            )
        if len(matches) > 1:
            raise InvalidRequestError(
                f"{name!r} is ambiguous: {_join(f'{m.kind} {_long_id(m)}' for m in matches)}.",
                param="target",
            )
        return matches[0]

    def _router_ids(self) -> list[str]:
        return [] if self._routers is None else [self._routers.own_id, *self._routers.links()]

    async def _drain_node(self, node: NodeInfo) -> Response:
        if node.is_head:
            raise InvalidRequestError(
                f"{node.ip} is the head node. Ray ends a drained node once it is idle, and with "
                "this one the cluster; drain its replicas instead.",
                param="target",
            )
        await self._nodes.drain(node)
        affected = [
            {"id": replica.info.id, "model": pool.name}
            for pool in self._pools.values()
            for replica in pool.replicas.running
            if replica.info.node_id == node.id
        ]
        body = {"kind": "node", "id": node.id, "ip": node.ip, "replicas": affected}
        return json_response(body)


async def _drain_replica(pool: Pool, replica: Replica) -> Response:
    in_flight = replica.in_flight
    if replica.link.connected:
        await _send(replica)
    elif not replica.is_draining:
        raise UnavailableError(
            f"The link to replica {replica.info.id} is {replica.link.state.value}; try again.",
            retry_after_s=1,
        )
    body = {"kind": "replica", "id": replica.info.id, "model": pool.name, "in_flight": in_flight}
    return json_response(body)


async def _send(replica: Replica) -> None:
    try:
        async with asyncio.timeout(REPLICA_TIMEOUT_S):
            stream = replica.link.open(RequestHead(method="POST", path=REPLICA_DRAIN_PATH))
            try:
                response = await stream.head()
            finally:
                stream.cancel()
    except (LinkError, RequestError, TimeoutError) as error:
        text = str(error) or f"no answer within {REPLICA_TIMEOUT_S:g} s"
        raise UnavailableError(f"Replica {replica.info.id}: {text}", retry_after_s=1) from None
    if response.status != 202:
        raise UnavailableError(
            f"Replica {replica.info.id} has another version, which cannot be drained.",
            retry_after_s=None,
        )


def _long_id(target: _Target) -> str:
    return target.found.id if isinstance(target.found, NodeInfo) else target.id


def _join(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MAX_LISTED
    return ", ".join(listed[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
