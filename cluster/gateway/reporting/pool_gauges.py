"""Export of the pools' state to the router's registry, on every scrape."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import get_args

from cluster.gateway.pools.pool import Pool
from cluster.metrics import Registry, table
from cluster.routing.breaker import CircuitState


def export_pool_gauges(registry: Registry, pools: Iterable[Pool]) -> None:
    """Set the pools' gauges whenever ``registry`` is collected."""
    for pool in pools:
        registry.on_collect(partial(_set_gauges, registry, pool))


def _set_gauges(registry: Registry, pool: Pool) -> None:
    replicas, capacity = pool.replicas, pool.queue.capacity
    loads = replicas.loads
    gauges = {
        table.IN_FLIGHT: pool.num_in_flight,
        table.QUEUED: pool.num_queued,
        table.QUEUED_TOKENS: pool.queue.queued_tokens,
        table.IN_FLIGHT_TOKENS: capacity.in_flight_tokens,
        table.CAPACITY_TOKENS: capacity.limit_tokens,
        table.DRAIN_RATE: capacity.drain_tokens_per_s() or 0.0,
        table.DRAINING_REPLICAS: sum(replica.is_draining for replica in replicas.running),
        table.RUNNING: sum(load.running for load in loads),
        table.WAITING: sum(load.waiting for load in loads),
        table.KV_CACHE: sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
        table.PREFIX_ENTRIES: replicas.prefixes.num_entries,
    }
    for metric, value in gauges.items():
        registry.gauge(metric, pool.name).value = float(value)
    states = Counter(replica.state for replica in replicas.running)
    for state in ("linked", "unlinked", "fallback"):
        registry.gauge(table.REPLICAS, pool.name, state).value = float(states[state])
    circuits = Counter(replicas.circuit(replica).state for replica in replicas.running)
    for circuit_state in get_args(CircuitState):
        gauge = registry.gauge(table.CIRCUITS, pool.name, circuit_state)
        gauge.value = float(circuits[circuit_state])
    prefixes, links = replicas.prefix_counts, replicas.link_counts
    counters = {
        (table.PREFIX_EVENTS, "stored"): prefixes.stored,
        (table.PREFIX_EVENTS, "removed"): prefixes.removed,
        (table.PREFIX_EVENTS, "cleared"): prefixes.cleared,
        (table.LINK_FRAMES, "sent"): links.frames_sent,
        (table.LINK_FRAMES, "received"): links.frames_received,
        (table.LINK_BYTES, "sent"): links.bytes_sent,
        (table.LINK_BYTES, "received"): links.bytes_received,
    }
    for (metric, label), total in counters.items():
        registry.counter(metric, pool.name, label).value = float(total)
    registry.counter(table.LINK_CONNECTS, pool.name).value = float(links.connects)
