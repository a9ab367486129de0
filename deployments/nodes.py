"""Draining nodes of the Ray cluster: the routers' view of them, and drains for operators."""

import asyncio
import logging
from collections.abc import Callable

from cluster.errors import UnavailableError
from cluster.gateway.builtin.drain import NodeDrains, NodeInfo
from cluster.periodic import Periodic
from cluster.ray_internals import drain_node, draining_nodes, live_nodes

logger = logging.getLogger("ray.serve.tandem")

WATCH_S = 5.0
"""Seconds between two looks at the draining nodes. A spot instance has 30 s or more."""
TIMEOUT_S = 5.0
MESSAGE = "tandem drain"


class RayNodes(NodeDrains):
    """Nodes of the Ray cluster; ``on_draining`` gets the ids of those that drain, regularly."""

    def __init__(self, on_draining: Callable[[frozenset[str]], None]) -> None:
        self._on_draining = on_draining
        self._watch = Periodic("watch of draining nodes", WATCH_S, self._read)

    async def list_nodes(self) -> list[NodeInfo]:
        try:
            nodes = await asyncio.to_thread(live_nodes, TIMEOUT_S)
        except Exception as error:  # Ray raises errors of several kinds
            raise UnavailableError(f"Ray's GCS does not answer: {error}") from error
        return [NodeInfo(node.id, node.ip, node.is_head) for node in nodes]

    async def drain(self, node: NodeInfo) -> None:
        try:
            refusal = await asyncio.to_thread(drain_node, node.id, MESSAGE, TIMEOUT_S)
        except Exception as error:
            raise UnavailableError(f"Ray's GCS does not answer: {error}") from error
        if refusal:
            raise UnavailableError(f"Ray does not drain node {node.id}: {refusal}")
        logger.warning("node %s (%s) drains: asked by an operator", node.id, node.ip)
        await self._read()

    async def close(self) -> None:
        await self._watch.close()

    async def _read(self) -> None:
        self._on_draining(await asyncio.to_thread(draining_nodes, TIMEOUT_S))
