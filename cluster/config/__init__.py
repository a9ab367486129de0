"""Configuration of a Tandem application: one frozen pydantic tree, checked when it is loaded.

This package exports the schema, which knows neither Ray nor files nor the command line.
``cluster.config.file`` reads ``ray-config.yaml``; ``cluster.config.overrides`` applies ``--set``.
"""

from cluster.config.application import ClusterConfig, TandemConfig, parse
from cluster.config.operations import (
    AccountingConfig,
    DevicesConfig,
    LeaksConfig,
    OperationsConfig,
    TracingConfig,
)
from cluster.config.pools import (
    PRIORITY_POLICY,
    TASK_HEADS,
    ClassifierConfig,
    ClassifierSlo,
    ClassifierTask,
    GeneratorConfig,
    GeneratorSlo,
    PoolConfig,
    ResultCacheConfig,
    RoutingPolicy,
    SimConfig,
)
from cluster.config.resources import BudgetConfig, ReplicasConfig, ResourcesConfig
from cluster.config.router import RouterConfig

__all__ = [
    "PRIORITY_POLICY",
    "TASK_HEADS",
    "AccountingConfig",
    "BudgetConfig",
    "ClassifierConfig",
    "ClassifierSlo",
    "ClassifierTask",
    "ClusterConfig",
    "DevicesConfig",
    "GeneratorConfig",
    "GeneratorSlo",
    "LeaksConfig",
    "OperationsConfig",
    "PoolConfig",
    "ReplicasConfig",
    "ResourcesConfig",
    "ResultCacheConfig",
    "RouterConfig",
    "RoutingPolicy",
    "SimConfig",
    "TandemConfig",
    "TracingConfig",
    "parse",
]
