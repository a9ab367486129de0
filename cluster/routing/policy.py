"""Interface of all routing policies, and their names in the configuration."""

from typing import Protocol, get_args

from cluster.config import RoutingPolicy
from cluster.errors import ConfigError
from cluster.routing.fleet import Fleet
from cluster.routing.load_policies import LeastLoad, PowerOfTwo, RoundRobin
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.prefix_policy import PrefixAffinity
from cluster.routing.request import RequestView
from cluster.routing.session_policy import SessionAffinity


class Policy(Protocol):
    """A choice of the replica for one request."""

    def choose(self, request: RequestView, fleet: Fleet) -> str | None:
        """Return the chosen replica's id; None if every replica is full or unreachable."""


def make_policy(name: str, index: PrefixIndex, seed: int = 0) -> Policy:
    """Return a new policy; ``prefix`` reads the index, which the caller keeps up to date.

    The seed of random choices and tie-breaking should differ between routers.

    Raises:
        ConfigError: there is no policy of that name.
    """
    match name:
        case "least-load":
            return LeastLoad(seed)
        case "power-of-two":
            return PowerOfTwo(seed)
        case "prefix":
            return PrefixAffinity(index, seed)
        case "round-robin":
            return RoundRobin(seed)
        case "session":
            return SessionAffinity(seed)
    raise ConfigError(f"routing: {name!r}; allowed: {', '.join(get_args(RoutingPolicy))}")
