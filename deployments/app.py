"""The composition root: ``ray-config.yaml``'s ``import_path``.

``build`` turns the checked configuration into one Serve application: a router deployment and one
deployment for each pool. Nothing is computed here that a replica needs twice.
"""

import warnings
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.autoscaling.settings import PoolSettings
from cluster.config import (
    ClassifierConfig,
    GeneratorConfig,
    ResourcesConfig,
    RouterConfig,
    TandemConfig,
    parse,
)
from deployments.autoscaling import DECIDE_S
from deployments.classifier import Classifier
from deployments.generator import Generator
from deployments.replica import SHUTDOWN_TIMEOUT_S
from deployments.router import Router

NAMED_REPLICA_ROUTER = "deployments.handles:NamedReplicaRouter"
SURGE_PERCENT = 100
"""On an update the new replicas start beside the old ones, so that there is no gap."""


def build(args: dict[str, Any] | TandemConfig) -> Application:
    """The Serve application for ``args``.

    Raises:
        ConfigError: a value is wrong; one line with the field, the value and what is allowed.
    """
    config = args if isinstance(args, TandemConfig) else parse(args)
    pools = {
        **{generator.name: _generator(config, generator) for generator in config.generators},
        **{classifier.name: _classifier(config, classifier) for classifier in config.classifiers},
    }
    router = serve.deployment(
        Router,
        name="router",
        autoscaling_config=_autoscaling(config, config.router),
        ray_actor_options=_actor_options(config.router.resources),
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        health_check_period_s=5,
        max_surge_percent=SURGE_PERCENT,
        # The router logs requests itself, and says more of them (deployments/request_log.py).
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return router.bind(config, pools)


def _generator(whole: TandemConfig, config: GeneratorConfig) -> Application:
    options: dict[str, Any] = {"ray_actor_options": _actor_options(config.resources)}
    if config.num_workers > 1:
        # Serve places the replica itself in the first bundle; a GPU replica computes nothing
        # there, its workers take one bundle each.
        bundle = _bundle(config.resources)
        options["placement_group_bundles"] = [bundle] * config.num_workers
        options["placement_group_strategy"] = "PACK"
        options["ray_actor_options"] = _actor_options(
            config.resources.model_copy(update={"gpus": 0.0})
        )
    return _pool(Generator, "generator", whole, config, options)


def _classifier(whole: TandemConfig, config: ClassifierConfig) -> Application:
    options = {"ray_actor_options": _actor_options(config.resources)}
    return _pool(Classifier, "classifier", whole, config, options)


def _pool(
    replica_class: type[Generator] | type[Classifier],
    kind: str,
    whole: TandemConfig,
    config: GeneratorConfig | ClassifierConfig,
    options: dict[str, Any],
) -> Application:
    deployment = serve.deployment(
        replica_class,
        name=f"{kind}-{config.name}",
        # Which replica, the routers choose; over a handle, too.
        request_router_config=RequestRouterConfig(request_router_class=NAMED_REPLICA_ROUTER),
        autoscaling_config=_autoscaling(whole, config),
        # Requests come over the link, which Serve does not count; the router limits them.
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        health_check_period_s=1,
        health_check_timeout_s=30,
        max_surge_percent=SURGE_PERCENT,
        **options,
    )
    return deployment.bind(config, whole.operations)


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
    whole: TandemConfig, part: GeneratorConfig | ClassifierConfig | RouterConfig
) -> AutoscalingConfig:
    """Tandem's policy, which keeps delays of its own; Serve's are nothing.

    What stands here decides for one deployment; the application's ``autoscaling_policy`` in the
    configuration takes its place and decides for all, with these same settings.
    """
    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:PoolPolicy",
        policy_kwargs=PoolSettings.of(whole, part).encoded(),
    )
    with warnings.catch_warnings():
        # Serve says that environment variables will replace it; this version does not read them.
        warnings.filterwarnings("ignore", ".*metrics_interval_s", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=part.replicas.min,
            max_replicas=part.replicas.max,
            target_ongoing_requests=part.replicas.target_in_flight,
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=DECIDE_S,
            look_back_period_s=5 * DECIDE_S,
            policy=policy,
        )
