"""What every routing policy offers."""

from typing import Protocol

from cluster.routing.fleet import Fleet
from cluster.routing.request import RequestView


class Policy(Protocol):
    """Chooses the replica for one request."""

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """The chosen replica's id; None where every replica is full or none is reachable."""
