"""Fewest ongoing requests first; equals take turns."""

from collections.abc import Sequence

from cluster.routing.policy import ReplicaView


class LeastLoad:
    """Chooses the replica with the fewest ongoing requests among those with room."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, replicas: Sequence[ReplicaView]) -> str | None:
        """The least loaded replica with room, ties broken in turn; None where all are full."""
        free = [replica for replica in replicas if replica.ongoing < replica.capacity]
        if not free:
            return None
        least = min(replica.ongoing for replica in free)
        equals = [replica for replica in free if replica.ongoing == least]
        self._turn += 1
        return equals[self._turn % len(equals)].id
