"""Which replica goes when one too many runs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaValue:
    """What would be lost with a replica."""

    id: str
    ongoing: int = 0
    """Requests that it must finish first."""
    cached_tokens_per_s: float = 0.0
    """Prompt tokens that its prefix cache spared lately; the work that others would get."""
    started_at: float = 0.0


def least_valuable(replicas: Sequence[ReplicaValue], count: int) -> list[str]:
    """The ``count`` replicas whose caches spare least; among equals the idlest, then newest."""
    order = sorted(replicas, key=lambda r: (r.cached_tokens_per_s, r.ongoing, -r.started_at, r.id))
    return [replica.id for replica in order[:count]]
