"""What a router knows of its pools at one moment, written into its registry when that is read."""

from collections import Counter
from collections.abc import Iterable
from functools import partial

from cluster.gateway.pools.pool import Pool
from cluster.metrics import Registry, table


def watch_pools(registry: Registry, pools: Iterable[Pool]) -> None:
    """Have every reading of ``registry`` show what the pools hold then."""
    for pool in pools:
        registry.on_collect(partial(_collect, registry, pool))


def _collect(registry: Registry, pool: Pool) -> None:
    loads = pool.loads
    levels = {
        table.IN_FLIGHT: pool.num_in_flight,
        table.QUEUED: pool.num_queued,
        table.QUEUED_TOKENS: pool.waiting.queued_tokens,
        table.IN_FLIGHT_TOKENS: pool.waiting.capacity.in_flight_tokens,
        table.CAPACITY_TOKENS: pool.waiting.capacity.limit_tokens,
        table.DRAIN_RATE: pool.waiting.capacity.drain_tokens_per_s() or 0.0,
        table.RUNNING: sum(load.running for load in loads),
        table.WAITING: sum(load.waiting for load in loads),
        table.KV_CACHE: sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
    }
    for metric, level in levels.items():
        registry.gauge(metric, pool.name).value = float(level)
    registry.gauge(table.PREFIX_ENTRIES, pool.name).value = float(pool.prefixes.num_entries)
    said = pool.prefix_counts
    changes = {"stored": said.stored, "removed": said.removed, "cleared": said.cleared}
    for event, total in changes.items():
        registry.counter(table.PREFIX_EVENTS, pool.name, event).value = float(total)
    states = Counter(replica.state for replica in pool.replicas)
    for state in ("linked", "unlinked", "fallback"):
        registry.gauge(table.REPLICAS, pool.name, state).value = float(states[state])
    counts = pool.link_counts
    registry.counter(table.LINK_CONNECTS, pool.name).value = float(counts.connects)
    sums = {
        (table.LINK_FRAMES, "sent"): counts.frames_sent,
        (table.LINK_FRAMES, "received"): counts.frames_received,
        (table.LINK_BYTES, "sent"): counts.bytes_sent,
        (table.LINK_BYTES, "received"): counts.bytes_received,
    }
    for (metric, direction), total in sums.items():
        registry.counter(metric, pool.name, direction).value = float(total)
