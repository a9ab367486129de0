"""What a deployment is to autoscaling, in the form in which Ray Serve hands it to the policy."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.autoscaling.plan import Budget
from cluster.autoscaling.signals import PoolSpec
from cluster.config import ClassifierConfig, GeneratorConfig, RouterConfig, TandemConfig

ROUTER = ""
"""The routers' name among the pools, which no pool can have."""
_ROUTER_PRIORITY = 2**31
"""Without a router nothing is served, whatever a pool's priority is."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """One pool's part of the configuration."""

    pool: str
    spec: PoolSpec
    limits: Mapping[str, float]
    """The objectives in seconds, by their names in the configuration."""
    budget: Budget
    """Of the whole application."""

    @classmethod
    def of(
        cls, whole: TandemConfig, part: GeneratorConfig | ClassifierConfig | RouterConfig
    ) -> "PoolSettings":
        """The settings of one part of ``whole``."""
        router = isinstance(part, RouterConfig)
        workers = part.num_workers
        spec = PoolSpec(
            min=part.replicas.min,
            max=part.replicas.max,
            cpus=part.resources.cpus * workers,
            gpus=part.resources.gpus * workers,
            priority=_ROUTER_PRIORITY if isinstance(part, RouterConfig) else part.priority,
            target_in_flight=part.replicas.target_in_flight,
            max_in_flight=math.inf if isinstance(part, RouterConfig) else part.max_in_flight,
            upscale_delay_s=part.replicas.upscale_delay_s,
            downscale_delay_s=part.replicas.downscale_delay_s,
            is_router=router,
        )
        limits = {} if isinstance(part, RouterConfig) else part.slo.model_dump(exclude_none=True)
        name = ROUTER if isinstance(part, RouterConfig) else part.name
        return cls(name, spec, limits, Budget(**whole.budget.model_dump(exclude_none=True)))

    def encoded(self) -> dict[str, Any]:
        """A JSON object; what has no limit is left out."""
        return {
            "pool": self.pool,
            "spec": _finite(asdict(self.spec)),
            "limits": dict(self.limits),
            "budget": _finite(asdict(self.budget)),
        }

    @classmethod
    def decoded(cls, encoded: Mapping[str, Any]) -> "PoolSettings":
        """The inverse of ``encoded``."""
        return cls(
            encoded["pool"],
            PoolSpec(**encoded["spec"]),
            encoded["limits"],
            Budget(**encoded["budget"]),
        )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != math.inf}
