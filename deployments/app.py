"""The Serve application; ``build`` is the ``import_path`` in ``ray-config.yaml``.

One router deployment, and one deployment for each pool. Serve passes the ``user_config`` to running
replicas, which apply what can change live. The version of a deployment covers the rest
(``cluster.config.changes``), so a change of that replaces the replicas, of this deployment only.
"""

import hashlib
import math
import warnings
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.autoscaling.settings import PoolSettings
from cluster.config import (
    ApplicationsConfig,
    ClassifierConfig,
    GeneratorConfig,
    ResourcesConfig,
    RouterConfig,
    ServedPool,
    TandemConfig,
    parse,
)
from cluster.config.changes import pool_version, router_version
from cluster.serve_internals import pin_version
from deployments.autoscaling import DECISION_INTERVAL_S
from deployments.replica import SHUTDOWN_S, Classifier, EngineReplica, Generator
from deployments.router import Router

NAMED_REPLICA_ROUTER = "deployments.discovery:NamedReplicaRouter"
SURGE_PERCENT = 100
"""Default share of the replicas that an update starts before it stops the old ones: no gap."""


def build(args: dict[str, Any] | TandemConfig) -> Application:
    """Return the Serve application for a configuration.

    Raises:
        ConfigError: a value is invalid; names the field, the value and what is allowed.
    """
    config = args if isinstance(args, TandemConfig) else parse(args)
    pools = {name: _served(config, name, pool) for name, pool in config.served_pools}
    router = serve.deployment(
        Router,
        name=config.router.deployment,
        user_config=config.model_dump(mode="json"),
        autoscaling_config=_autoscaling(config, config.router),
        ray_actor_options=_actor_options(config.router.resources),
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=config.max_answer_s + SHUTDOWN_S,
        health_check_period_s=5,
        max_surge_percent=_surge_percent(config, config.router),
        # The router's own request log has more detail (deployments/logs.py).
        logging_config=LoggingConfig(enable_access_log=False),
    )
    pin_version(router, router_version(config))
    if all(pool.rollout is None for pool in config.pools):
        return router.bind(config, pools)
    return router.bind(config, pools, _rollouts(config, pools))


def _rollouts(config: TandemConfig, pools: dict[str, Application]) -> Application:
    """Return the decider of all rollouts, which exists while there are any."""
    # Not imported otherwise: the start of a cluster waits for this module.
    from deployments.rollouts import Rollouts

    decider = serve.deployment(
        Rollouts,
        name="rollouts",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        max_surge_percent=0,  # never two deciders
    )
    pin_version(decider, hashlib.sha256(config.model_dump_json().encode()).hexdigest())
    return decider.bind(config, pools)


def _served(config: TandemConfig, name: str, pool: ServedPool) -> Application:
    if isinstance(pool, GeneratorConfig):
        return _generator(config, name, pool)
    if isinstance(pool, ClassifierConfig):
        return _classifier(config, name, pool)
    return _applications(config, name, pool)


def _generator(config: TandemConfig, name: str, pool: GeneratorConfig) -> Application:
    options: dict[str, Any] = {"ray_actor_options": _actor_options(pool.resources)}
    if pool.num_workers > 1:
        # Serve places the replica in the first bundle. The replica of a GPU engine computes
        # nothing itself; its workers take one bundle each.
        bundle = _bundle(pool.resources)
        options["placement_group_bundles"] = [bundle] * pool.num_workers
        options["placement_group_strategy"] = "STRICT_PACK" if pool.needs_one_node else "PACK"
        options["ray_actor_options"] = _actor_options(
            pool.resources.model_copy(update={"gpus": 0.0})
        )
    return _pool(Generator, config, name, pool, options)


def _classifier(config: TandemConfig, name: str, pool: ClassifierConfig) -> Application:
    options = {"ray_actor_options": _actor_options(pool.resources)}
    return _pool(Classifier, config, name, pool, options)


def _applications(config: TandemConfig, name: str, pool: ApplicationsConfig) -> Application:
    # Not imported with the application's routers, which need none of it.
    from deployments.applications import Applications

    options = {"ray_actor_options": _actor_options(pool.resources)}
    return _pool(Applications, config, name, config.with_default_models(pool), options)


def _pool(
    replica_class: type[EngineReplica],
    config: TandemConfig,
    name: str,
    pool: ServedPool,
    options: dict[str, Any],
) -> Application:
    own = pool
    if not isinstance(pool, ApplicationsConfig):
        # Neither the beginning nor the end of a rollout changes a replica.
        own = pool.model_copy(update={"rollout": None})
    deployment = serve.deployment(
        replica_class,
        name=pool.deployment,
        user_config={
            "pool": own.model_dump(mode="json"),
            "operations": config.operations.model_dump(mode="json"),
        },
        # Tandem's routers choose the replica, also for requests over the handle.
        request_router_config=RequestRouterConfig(request_router_class=NAMED_REPLICA_ROUTER),
        autoscaling_config=_autoscaling(config, pool, name),
        # The routers limit the requests; Serve does not see those that come over links.
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=config.max_answer_s + SHUTDOWN_S,
        health_check_period_s=1,
        health_check_timeout_s=30,
        max_surge_percent=_surge_percent(config, pool),
        **options,
    )
    pin_version(deployment, pool_version(own, config.operations))
    return deployment.bind(own, config.operations)


def _surge_percent(config: TandemConfig, part: ServedPool | RouterConfig) -> int:
    """Return the share of a part's replicas that fits on the cluster beside the old ones.

    Serve would wait forever for the room for larger surges.
    """
    if part.replicas.max_surge_percent is not None:
        return part.replicas.max_surge_percent
    gpus = part.num_workers * part.resources.gpus
    if not gpus:
        return SURGE_PERCENT
    total = config.budget.gpus
    if total is None:
        total = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    used = sum(pool.replicas.max * pool.num_workers * pool.resources.gpus for pool in config.pools)
    fitting = math.floor((total - used) / gpus + 1e-9)
    return max(0, min(SURGE_PERCENT, 100 * fitting // part.replicas.max))


def _actor_options(resources: ResourcesConfig) -> dict[str, Any]:
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": dict(resources.custom),
    }


def _bundle(resources: ResourcesConfig) -> dict[str, float]:
    bundle = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    return {name: amount for name, amount in bundle.items() if amount}


def _autoscaling(
    config: TandemConfig,
    part: ServedPool | RouterConfig,
    name: str | None = None,
) -> AutoscalingConfig:
    """Return Tandem's policy for one deployment; ``name`` is the pool's in the routers.

    If the application has an ``autoscaling_policy``, that one decides for all deployments instead,
    with the settings given here.
    """
    settings = PoolSettings.from_config(config, part, name)
    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:PoolPolicy",
        policy_kwargs=settings.encode(),
    )
    with warnings.catch_warnings():
        # Serve announces environment variables instead, but this version does not read them.
        warnings.filterwarnings("ignore", ".*metrics_interval_s", DeprecationWarning)
        return AutoscalingConfig(
            # A rollout sets its own limits, also below the pool's.
            min_replicas=0 if settings.rollout else part.replicas.min,
            max_replicas=part.replicas.max,
            target_ongoing_requests=part.replicas.target_in_flight,
            # The policy applies the configured delays itself.
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=DECISION_INTERVAL_S,
            look_back_period_s=5 * DECISION_INTERVAL_S,
            policy=policy,
        )
