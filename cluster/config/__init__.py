"""Configuration of a Tandem application: one frozen pydantic tree, checked when it is loaded.

This package exports the schema, which knows neither Ray nor files nor the command line.
``cluster.config.file`` reads ``ray-config.yaml``; ``cluster.config.overrides`` applies ``--set``.
"""

from cluster.config.application import ClusterConfig, ServedPool, TandemConfig, parse
from cluster.config.applications import ApplicationsConfig
from cluster.config.choice import AutoConfig, AutoRule
from cluster.config.guards import GuardAction, GuardConfig, PatternName
from cluster.config.media import MediaConfig
from cluster.config.operations import (
    AccountingConfig,
    DevicesConfig,
    IdempotencyConfig,
    LeaksConfig,
    OperationsConfig,
    TracingConfig,
)
from cluster.config.pools import (
    AUTO,
    NONE,
    PRIORITY_POLICY,
    TASK_HEADS,
    ClassifierConfig,
    ClassifierTask,
    FallbackReason,
    GeneratorConfig,
    ResultCacheConfig,
    RoutingPolicy,
    SimConfig,
)
from cluster.config.resources import ResourcesConfig
from cluster.config.rollout import RolloutConfig
from cluster.config.router import (
    BatchesConfig,
    CircuitBreakerConfig,
    HandoverConfig,
    HedgeConfig,
    RouterConfig,
)
from cluster.config.section import list_allowed

__all__ = [
    "AUTO",
    "NONE",
    "PRIORITY_POLICY",
    "TASK_HEADS",
    "AccountingConfig",
    "ApplicationsConfig",
    "AutoConfig",
    "AutoRule",
    "BatchesConfig",
    "CircuitBreakerConfig",
    "ClassifierConfig",
    "ClassifierTask",
    "ClusterConfig",
    "DevicesConfig",
    "FallbackReason",
    "GeneratorConfig",
    "GuardAction",
    "GuardConfig",
    "HandoverConfig",
    "HedgeConfig",
    "IdempotencyConfig",
    "LeaksConfig",
    "MediaConfig",
    "OperationsConfig",
    "PatternName",
    "ResourcesConfig",
    "ResultCacheConfig",
    "RolloutConfig",
    "RouterConfig",
    "RoutingPolicy",
    "ServedPool",
    "SimConfig",
    "TandemConfig",
    "TracingConfig",
    "list_allowed",
    "parse",
]
