"""A deployment's part of the configuration, in the form in which Ray Serve carries it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from cluster.autoscaling.autoscaler import Budget
from cluster.autoscaling.signals import PoolSpec
from cluster.config import (
    ClassifierConfig,
    GeneratorConfig,
    RouterConfig,
    ServedPool,
    TandemConfig,
)

ROUTER = ""
"""Name of the routers among the pools; no pool can have it."""
_ROUTER_PRIORITY = 2**31
"""Above every pool's priority, because nothing is served without a router."""


def _computes_on_cores(part: ServedPool | RouterConfig) -> bool:
    is_vllm = isinstance(part, GeneratorConfig) and part.engine == "vllm"
    return is_vllm or isinstance(part, ClassifierConfig)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Settings of one pool, or of the routers."""

    pool: str
    spec: PoolSpec
    limits: Mapping[str, float]
    """Objectives in seconds, by their names in the configuration."""
    budget: Budget
    """Budget of the whole application."""
    rollout: str = ""
    """Version that a rollout of the pool introduces; it limits the replicas. Empty if none runs."""
    rollout_model: str = ""
    """Model of that version."""

    @property
    def is_candidate(self) -> bool:
        """True if this is the new version of a rollout."""
        return bool(self.rollout) and self.pool.endswith(f"@{self.rollout}")

    @classmethod
    def from_config(
        cls,
        config: TandemConfig,
        part: ServedPool | RouterConfig,
        name: str | None = None,
    ) -> "PoolSettings":
        """Return the settings of one deployment; ``name`` is the pool's in the routers."""
        rollout = None
        if isinstance(part, RouterConfig):
            pool, priority, max_in_flight = ROUTER, _ROUTER_PRIORITY, math.inf
            limits: dict[str, float] = {}
        else:
            pool, priority, max_in_flight = name or part.name, part.priority, part.max_in_flight
            limits = part.slo.model_dump(exclude_none=True)
            rollout = next((p.rollout for p in config.pools if p.name == part.name), None)
        spec = PoolSpec(
            min=part.replicas.min,
            max=part.replicas.max,
            cpus=part.resources.cpus * part.num_workers,
            gpus=part.resources.gpus * part.num_workers,
            priority=priority,
            target_in_flight=part.replicas.target_in_flight,
            max_in_flight=max_in_flight,
            upscale_delay_s=part.replicas.upscale_delay_s,
            downscale_delay_s=part.replicas.downscale_delay_s,
            is_router=pool == ROUTER,
            fills_nodes=_computes_on_cores(part) and not part.resources.gpus,
        )
        budget = Budget(**config.budget.model_dump(exclude_none=True))
        version, model = (rollout.version, rollout.model) if rollout is not None else ("", "")
        return cls(pool, spec, limits, budget, version, model)

    def encode(self) -> dict[str, Any]:
        """Return a JSON object; infinite values are left out."""
        encoded = asdict(self)
        for part in "spec", "budget":
            encoded[part] = {k: v for k, v in encoded[part].items() if v != math.inf}
        return encoded

    @classmethod
    def decode(cls, encoded: Mapping[str, Any]) -> "PoolSettings":
        return msgspec.convert(encoded, cls)
