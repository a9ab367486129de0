"""Reaching a replica through Ray Serve's handle, where a link to it cannot be opened."""

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.client.handle import HandleAnswer
from cluster.gateway import Answer, Opener
from cluster.link import RequestHead


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Sends a request to the replica that its first argument names, while that one runs."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The named replica alone; every one where it does not run any more."""
        wanted = pending_request.args[0] if pending_request and pending_request.args else None
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named or candidate_replicas]


def opener(handle: DeploymentHandle, replica_id: str) -> Opener:
    """The way to one replica through its deployment's handle."""
    streaming = handle.options(stream=True)

    def open_(head: RequestHead, body: bytes) -> Answer:
        return HandleAnswer(streaming.answer_call.remote(replica_id, head, body))

    return open_
