"""What a routing policy sees and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica that may take a request now."""

    id: str
    ongoing: int
    """Requests that it is serving, this router's and the others'."""
    capacity: int
    """Requests that it may be given at a time."""


class Policy(Protocol):
    """Chooses the replica for one request."""

    def choose(self, replicas: Sequence[ReplicaView]) -> str | None:
        """The chosen replica's id; None where every replica is full or there is none."""
