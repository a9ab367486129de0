"""Configuration of replica counts, of the resources of a replica, and of the overall budget."""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from cluster.config.section import Section


class ReplicasConfig(Section):
    """Replica counts of a pool, and the load at which autoscaling changes them."""

    renamed_fields: ClassVar[Mapping[str, str]] = {"target_ongoing": "target_in_flight"}

    min: int = Field(1, ge=0, le=4096)
    """Smallest number of replicas. With 0, the pool has no replica while it has no requests, and
    the first request waits in the router for a cold start."""
    max: int = Field(1, ge=1, le=4096)
    """Largest number of replicas. Equal to `min`: no autoscaling."""
    target_in_flight: float = Field(32.0, gt=0)
    """Requests in flight per replica at which autoscaling aims until it has measured the capacity
    of a replica."""
    upscale_delay_s: float = Field(2.0, ge=0)
    """Time in seconds for which more replicas must be needed before any is added. The first
    replica of an empty pool is added at once."""
    downscale_delay_s: float = Field(120.0, ge=0)
    """Time in seconds for which fewer replicas must suffice before any is removed."""
    max_surge_percent: int | None = Field(None, ge=0, le=100)
    """Share of the replicas that an update starts before it stops the old ones. With 0 it stops
    first, and requests wait. Default: 100, in pools on GPUs as many as fit beside all pools at
    their `max` on the cluster's GPUs (`budget.gpus`, or those present at the deployment)."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max must be at least min ({self.min})")
        return self


class ResourcesConfig(Section):
    """Ray resources reserved for one replica; in generator pools, for each worker of a replica.

    They are logical: Ray places replicas by them and does not enforce them.
    """

    cpus: float = Field(0.25, ge=0)
    """Logical CPUs; fractions are allowed."""
    gpus: float = Field(0.0, ge=0)
    """Logical GPUs, at most 1; fractions share a GPU. `tandem up` sets it for pools that do not, if
    the machine has GPUs."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources by name, e.g. `{A100: 1}`."""


class BudgetConfig(Section):
    """Limit on the resources that all pools and routers reserve together.

    When it is exhausted, the router is served first, then the pools by their `priority`.
    """

    cpus: float | None = Field(None, ge=0)
    """Logical CPUs. Default: no limit."""
    gpus: float | None = Field(None, ge=0)
    """Logical GPUs. Default: no limit."""
