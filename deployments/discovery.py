"""Running replicas of a deployment: how a router finds them, and reaches them without a link.

Subscribes to the long poll that Serve's own handles use, so a router learns of a replica as soon as
Serve does. Serve has no public way to list running replicas without sending a request.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.client.transport import HandleAnswer
from cluster.gateway import Answer, Opener, ReplicaInfo
from cluster.link import RequestHead
from cluster.ray_internals import (
    SERVE_CONTROLLER_NAME,
    SERVE_NAMESPACE,
    DeploymentID,
    DeploymentTargetInfo,
    LongPollClient,
    LongPollNamespace,
    RunningReplicaInfo,
)

logger = logging.getLogger("ray.serve.tandem")

Listener = Callable[[Sequence[ReplicaInfo]], None]

SUPERVISE_S = 1.0
"""Seconds between checks of the subscription, which ends when the controller dies."""


class Discovery:
    """Calls a listener for each deployment when its running replicas change."""

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
                    except Exception:  # the controller or the GCS restarts
                        logger.warning("cannot subscribe to the replicas; retrying", exc_info=True)
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
        """Raise if updates of the replicas would no longer arrive."""
        if self._supervisor.done():
            raise RuntimeError("the subscription to the running replicas has ended")

    async def close(self) -> None:
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])


def _info(replica: RunningReplicaInfo) -> ReplicaInfo:
    return ReplicaInfo.from_metadata(replica.replica_id.unique_id, replica.replica_metadata)


def _on_targets(listener: Listener) -> Callable[[DeploymentTargetInfo], None]:
    def update(targets: DeploymentTargetInfo) -> None:
        # An exception would silently end the subscription of every deployment.
        try:
            listener([_info(replica) for replica in targets.running_replicas])
        except Exception:
            logger.exception("could not process an update of the running replicas")

    return update


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Serve request router that sends a request to the replica named by its first argument."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return only the named replica, or all replicas if it no longer runs."""
        wanted = pending_request.args[0] if pending_request and pending_request.args else None
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named or candidate_replicas]


def handle_opener(handle: DeploymentHandle, replica_id: str) -> Opener:
    """Return a function that opens requests to one replica over its deployment's handle.

    Used while no link to the replica can be opened.
    """
    streaming = handle.options(stream=True)

    def open_request(head: RequestHead, body: bytes) -> Answer:
        return HandleAnswer(streaming.answer_call.remote(replica_id, head, body))

    return open_request
