"""Policies by the names that the configuration has for them."""

from typing import get_args

from cluster.config import RoutingPolicy
from cluster.errors import ConfigError
from cluster.routing.load import LeastLoad, PowerOfTwo, RoundRobin
from cluster.routing.policy import Policy
from cluster.routing.prefix import PrefixAffinity
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.session import SessionAffinity


def make_policy(name: str, index: PrefixIndex, seed: int = 0) -> Policy:
    """The policy of that name.

    Args:
        name: As in the configuration.
        index: What ``prefix`` asks; whoever owns it tells it what replicas store.
        seed: Of what is drawn by chance, and where turns begin; another one in each router.

    Raises:
        ConfigError: there is no such policy.
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
