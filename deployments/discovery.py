"""Which replicas of a deployment run, as Ray Serve's controller tells it.

Subscribes to the same long poll as Serve's own handles do, so a router learns of a replica when
Serve does. The names are Serve's private ones: Serve offers no public way to see a deployment's
running replicas without sending a request; ``tests/cluster`` notices when they change.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo, RunningReplicaInfo
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
                    try:
                        subscription = self._subscribe()
                    except Exception:  # the controller or GCS is being restarted
                        logger.warning("no word of the running replicas; trying on", exc_info=True)
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

    def check_health(self) -> None:
        """Raise if nothing would be heard of the replicas any more."""
        if self._supervisor.done():
            raise RuntimeError("the subscription to the running replicas has ended")

    async def close(self) -> None:
        """End the subscription."""
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])


def _info(replica: RunningReplicaInfo) -> ReplicaInfo:
    return ReplicaInfo.from_metadata(replica.replica_id.unique_id, replica.replica_metadata)


def _on_targets(listener: Listener) -> Callable[[DeploymentTargetInfo], None]:
    def update(targets: DeploymentTargetInfo) -> None:
        # An exception in here would end the subscription of every deployment without a word.
        try:
            listener([_info(replica) for replica in targets.running_replicas])
        except Exception:
            logger.exception("the running replicas could not be taken in")

    return update
