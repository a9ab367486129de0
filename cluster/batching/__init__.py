"""Which waiting texts make up the next batch of an encoder; pure functions and state machines."""

from cluster.batching.batcher import Batch, Batcher, Item
from cluster.batching.groups import group_by_length

__all__ = ["Batch", "Batcher", "Item", "group_by_length"]
