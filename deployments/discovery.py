"""Which replicas of a deployment run, as Ray Serve's controller tells it.

Subscribes to the same long poll as Serve's own handles do, so a router learns of a replica when
Serve does. The names are Serve's private ones: Serve offers no public way to see a deployment's
running replicas without sending a request; ``tests/cluster`` notices when they change.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from cluster.gateway import ReplicaInfo

logger = logging.getLogger("ray.serve.tandem")

Listener = Callable[[Sequence[ReplicaInfo]], None]

SUPERVISE_S = 1.0
"""How often it is checked that the subscription lives; it ends when the controller dies."""


class Discovery:
    """Calls a listener for each deployment whenever the set of its running replicas changes."""

    def __init__(self, listeners: Mapping[DeploymentID, Listener]) -> None:
        self._listeners = listeners
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        subscription: LongPollClient | None = None
        try:
            while True:
                if subscription is None or not subscription.is_running:
                    with contextlib.suppress(ValueError):  # the controller is being restarted
                        subscription = self._subscribe()
                await asyncio.sleep(SUPERVISE_S)
        finally:
            if subscription is not None:
                subscription.stop()

    def _subscribe(self) -> LongPollClient:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        keys = {
            (LongPollNamespace.DEPLOYMENT_TARGETS, deployment): _on_targets(listener)
            for deployment, listener in self._listeners.items()
        }
        return LongPollClient(
            controller,
            keys,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"tandem-router:{ray.get_runtime_context().get_actor_id()}",
        )

    async def close(self) -> None:
        """End the subscription."""
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor


def _on_targets(listener: Listener) -> Callable[[DeploymentTargetInfo], None]:
    def update(targets: DeploymentTargetInfo) -> None:
        infos = []
        for replica in targets.running_replicas:
            name = replica.replica_id.unique_id
            try:
                infos.append(ReplicaInfo.from_metadata(name, replica.replica_metadata))
            except KeyError:
                logger.warning("replica %s did not say where its link is", name)
        listener(infos)

    return update
