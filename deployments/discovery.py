"""Running replicas of a deployment: how a router finds them, and reaches them without a link.

Subscribes to the long poll that Serve's own handles use, so a router learns of a replica as soon as
Serve does. Serve has no public way to list running replicas without sending a request.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.client.transport import HandleAnswer
from cluster.gateway import Answer, Opener, ReplicaInfo
from cluster.link import RequestHead
from cluster.serve_internals import (
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
SILENT_S = 120.0
"""Age of the last answer at which the subscription is replaced, in seconds. Without a change, the
controller answers after at most 60 s (Serve's LISTEN_FOR_CHANGE_REQUEST_TIMEOUT_S)."""


class Subscription(LongPollClient):  # type: ignore[misc]  # Ray is not typed
    """Long poll that ends when it cannot go on; Serve's own would stay silent forever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._answered_at = time.monotonic()
        super().__init__(*args, **kwargs)

    @property
    def is_alive(self) -> bool:
        """True while updates arrive."""
        return self.is_running and time.monotonic() - self._answered_at < SILENT_S

    def _process_update(self, updates: Any) -> None:
        self._answered_at = time.monotonic()
        try:
            super()._process_update(updates)
        except Exception:  # an error that Serve does not expect, such as a lost owner
            logger.exception("unexpected answer to the subscription: %.200r", updates)
            self.stop()


class Discovery:
    """Calls a listener for each deployment when its running replicas change."""

    def __init__(self, listeners: Mapping[DeploymentID, Listener]) -> None:
        self._listeners = listeners
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        subscription: Subscription | None = None
        try:
            while True:
                if subscription is None or not subscription.is_alive:
                    if subscription is not None:
                        subscription.stop()
                    try:
                        subscription = self._subscribe()
                    except Exception:  # the controller or the GCS restarts
                        logger.warning("cannot subscribe to the replicas; retrying", exc_info=True)
                await asyncio.sleep(SUPERVISE_S)
        finally:
            if subscription is not None:
                subscription.stop()

    def _subscribe(self) -> Subscription:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        keys = {
            (LongPollNamespace.DEPLOYMENT_TARGETS, deployment): _on_targets(listener)
            for deployment, listener in self._listeners.items()
        }
        return Subscription(
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


def _readable(replicas: Iterable[RunningReplicaInfo]) -> Iterator[ReplicaInfo]:
    """Yield the replicas that described themselves as this release does."""
    for replica in replicas:
        id_, metadata = replica.replica_id.unique_id, replica.replica_metadata
        try:
            yield ReplicaInfo.from_metadata(id_, metadata, replica.node_id or "")
        except Exception:
            logger.exception("ignoring replica %s with unreadable metadata: %.200r", id_, metadata)


def _on_targets(listener: Listener) -> Callable[[DeploymentTargetInfo], None]:
    def update(targets: DeploymentTargetInfo) -> None:
        # An exception would silently end the subscription of every deployment.
        try:
            listener(list(_readable(targets.running_replicas)))
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
