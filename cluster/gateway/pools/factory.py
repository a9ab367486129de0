"""Construction of a router's pools from the configuration.

The only module of the gateway that distinguishes engines and their options.
"""

from collections.abc import Mapping

from cluster.admission import QueueLimits
from cluster.config import (
    PRIORITY_POLICY,
    ClassifierConfig,
    GeneratorConfig,
    RouterConfig,
    TandemConfig,
)
from cluster.gateway.pools.handover import HandoverLimits
from cluster.gateway.pools.pool import Pool, PoolKind
from cluster.gateway.pools.replica import Wiring
from cluster.gateway.pools.replica_set import PoolLimits
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.metrics import table


def make_pools(
    config: TandemConfig, wirings: Mapping[str, Wiring], sinks: RequestSinks
) -> dict[str, Pool]:
    """Return all pools by name; ``wirings`` has an entry for each."""
    configs: list[tuple[PoolKind, GeneratorConfig | ClassifierConfig]] = [
        *(("generator", pool) for pool in config.generators),
        *(("classifier", pool) for pool in config.classifiers),
    ]
    pools = {}
    enabled = config.router.handover.enabled
    handover = HandoverLimits(config.router.handover) if enabled else None
    for kind, pool in configs:
        limits = _pool_limits(config.router, pool, handover)
        meter = PoolMeter(pool.name, sinks)
        _export_objectives(pool, sinks)
        pools[pool.name] = Pool(pool.name, kind, limits, wirings[pool.name], meter)
    return pools


def _pool_limits(
    router: RouterConfig,
    pool: GeneratorConfig | ClassifierConfig,
    handover: HandoverLimits | None,
) -> PoolLimits:
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
        start_timeout_s=None if pool.replicas.min else router.start_timeout_s,
    )


def _schedules_by_priority(pool: GeneratorConfig | ClassifierConfig) -> bool:
    if not isinstance(pool, GeneratorConfig) or pool.engine != "vllm":
        return False
    return bool(pool.engine_args.get("scheduling_policy", PRIORITY_POLICY) == PRIORITY_POLICY)


def _export_objectives(pool: GeneratorConfig | ClassifierConfig, sinks: RequestSinks) -> None:
    """Export each SLO as the bucket bound that alerts can compare percentiles with."""
    for name, limit_s in pool.slo:
        if limit_s is not None:
            _, metric = table.SLO_METRICS[name]
            gauge = sinks.registry.gauge(table.OBJECTIVE, pool.name, name.removesuffix("_s"))
            gauge.value = metric.bound_above(limit_s)
