"""Construction of a router's pools from the configuration.

The only module of the gateway that distinguishes engines and their options.
"""

import math
from collections.abc import Mapping

from cluster.admission import QueueLimits
from cluster.config import (
    PRIORITY_POLICY,
    ApplicationsConfig,
    ClassifierConfig,
    GeneratorConfig,
    RouterConfig,
    ServedPool,
    TandemConfig,
)
from cluster.gateway.pools.handover import HandoverLimits
from cluster.gateway.pools.pool import Pool, PoolKind
from cluster.gateway.pools.replica import Wiring
from cluster.gateway.pools.replica_set import PoolLimits
from cluster.gateway.pools.rollout import Rollout
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.metrics import Registry, table
from cluster.routing import BreakerLimits

_KINDS: Mapping[type, PoolKind] = {
    GeneratorConfig: "generator",
    ClassifierConfig: "classifier",
    ApplicationsConfig: "application",
}


def make_pools(
    config: TandemConfig, wirings: Mapping[str, Wiring], sinks: RequestSinks
) -> dict[str, Pool]:
    """Return all pools by name, candidates included; ``wirings`` has an entry for each."""
    handover = HandoverLimits(config.router.handover)
    pools = {}
    for name, pool in config.served_pools:
        limits = _pool_limits(config.router, name, pool, handover)
        meter = PoolMeter(name, sinks, pool.name)
        _export_objectives(pool, sinks)
        pools[name] = Pool(name, _KINDS[type(pool)], limits, wirings[name], meter)
    return pools


def make_rollouts(
    config: TandemConfig, pools: Mapping[str, Pool], registry: Registry
) -> dict[str, Rollout]:
    """Return the rollouts by the name of their pool."""
    return {
        pool.name: Rollout(pools[pool.name], pools[pool.candidate_name], pool.rollout, registry)
        for pool in config.pools
        if pool.rollout is not None
    }


def reconfigure_pools(config: TandemConfig, pools: Mapping[str, Pool], sinks: RequestSinks) -> None:
    """Apply changed settings; ``config`` has the same pools."""
    for name, pool in config.served_pools:
        handover = pools[name].limits.handover
        assert handover is not None
        handover.config = config.router.handover  # shared by all pools
        limits = _pool_limits(config.router, name, pool, handover)
        pools[name].set_limits(limits)
        _export_objectives(pool, sinks)


def _pool_limits(
    router: RouterConfig,
    name: str,
    pool: ServedPool,
    handover: HandoverLimits,
) -> PoolLimits:
    is_rolled_out = pool.rollout is not None or name != pool.name
    breaker = router.circuit_breaker
    # Without room for a second replica, a rollout stops the only one before the new one starts.
    may_be_empty = is_rolled_out or not pool.replicas.min
    return PoolLimits(
        max_in_flight=pool.max_in_flight,
        queue=QueueLimits(router.max_queued_tokens, router.max_queued),
        queue_timeout_s=router.queue_timeout_s,
        routing=pool.routing,
        engine_priorities=_schedules_by_priority(pool),
        aliases=pool.aliases,
        adapters=tuple(pool.adapters) if isinstance(pool, GeneratorConfig) else (),
        max_loras=pool.max_loras if isinstance(pool, GeneratorConfig) else 1,
        max_sequences=(
            router.max_sequences_per_request if isinstance(pool, GeneratorConfig) else None
        ),
        context_tokens=pool.max_model_len if isinstance(pool, GeneratorConfig) else None,
        handover=handover,
        breaker=(
            BreakerLimits(breaker.max_share, breaker.slow_factor)
            # A slow task says nothing about its replica: the models decide.
            if breaker.enabled and not isinstance(pool, ApplicationsConfig)
            else None
        ),
        hedge_share=(
            router.hedge.max_share
            if router.hedge.enabled and isinstance(pool, ClassifierConfig)
            else 0.0
        ),
        start_timeout_s=router.start_timeout_s if may_be_empty else None,
    )


def _schedules_by_priority(pool: ServedPool) -> bool:
    if not isinstance(pool, GeneratorConfig) or pool.engine != "vllm":
        return False
    return bool(pool.engine_args.get("scheduling_policy", PRIORITY_POLICY) == PRIORITY_POLICY)


def _export_objectives(pool: ServedPool, sinks: RequestSinks) -> None:
    """Export each SLO as the bucket bound that alerts can compare percentiles with."""
    for name, limit_s in pool.slo:
        labels = pool.name, name.removesuffix("_s")
        if limit_s is not None:
            _, metric = table.SLO_METRICS[name]
            sinks.registry.gauge(table.OBJECTIVE, *labels).value = metric.bound_above(limit_s)
        elif labels in sinks.registry.series(table.OBJECTIVE):  # it was dropped
            sinks.registry.gauge(table.OBJECTIVE, *labels).value = math.inf
