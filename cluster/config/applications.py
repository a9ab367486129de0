"""Configuration of the applications: typed tasks that call generators and classifiers."""

from typing import ClassVar

from pydantic import Field

from cluster.config.pools import ModelName, RoutingPolicy
from cluster.config.resources import ReplicasConfig, ResourcesConfig
from cluster.config.rollout import RolloutConfig
from cluster.config.section import Section

APPLICATIONS = "applications"
"""Name of the applications among the routers' pools, of their deployment, and in metrics."""
TASK_PREFIX = "/v1/tasks/"
TASKS = ("answer", "classify", "extract", "sentiment", "summarize", "translate")
TASK_PATHS = tuple(TASK_PREFIX + task for task in TASKS)


class _NoSlo(Section):
    """Objectives of the applications: none, because a task may take a second or many minutes."""


class ApplicationsConfig(Section):
    """Typed tasks (`/v1/tasks/…`), which a deployment of their own answers."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"templates", "resources"})
    kind: ClassVar[str] = "application"
    name: ClassVar[str] = APPLICATIONS
    deployment: ClassVar[str] = APPLICATIONS
    num_workers: ClassVar[int] = 1
    aliases: ClassVar[tuple[str, ...]] = ()
    model_files: ClassVar[tuple[str, ...]] = ()
    rollout: ClassVar[RolloutConfig | None] = None
    routing: ClassVar[RoutingPolicy] = "least-load"
    slo: ClassVar[_NoSlo] = _NoSlo()

    generator: ModelName | None = None
    """Generator of tasks whose request names no `model`. Default: the first one."""
    classifier: ModelName | None = None
    """Classifier of `sentiment` if the request names none. Default: the first with the task
    `classify`."""
    encoder: ModelName | None = None
    """Classifier of the method `encoder` of `classify` if the request names none. Default: the
    first with the task `embed`."""
    templates: str | None = None
    """Directory of prompt templates that replace the built-in ones of the same name, at the same
    path on every node."""
    max_chars: int = Field(1_000_000, ge=1)
    """Maximum number of characters of a request's texts together; larger requests get status
    413."""
    max_calls: int = Field(8, ge=1, le=256)
    """Maximum number of calls to models that one task makes at the same time."""
    max_in_flight: int = Field(64, ge=1)
    """Maximum number of tasks in flight at one replica; others wait in the router."""
    priority: int = 0
    """Precedence when the budget is exhausted, as for pools."""
    replicas: ReplicasConfig = ReplicasConfig(min=1, max=2, target_in_flight=16)
    """Replica counts and autoscaling."""
    # With the other replicas of the default configuration, this leaves one of two CPUs to Ray jobs.
    resources: ResourcesConfig = ResourcesConfig(cpus=0.05)
    """Resources of one replica."""
