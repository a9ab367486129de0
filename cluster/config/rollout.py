"""Configuration of a rollout: the step-by-step replacement of a pool's model."""

from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

from cluster.config.section import Section

VERSION_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"


def _check_steps(steps: tuple[float, ...]) -> tuple[float, ...]:
    if not all(low < high for low, high in pairwise((0.0, *steps))) or steps[-1] != 100:
        raise ValueError("the steps must ascend and end with 100, such as [5, 25, 100]")
    return steps


class RolloutConfig(Section):
    """Replacement of a pool's model by a new version, in steps, with automatic rollback."""

    model: str = Field(min_length=1)
    """Model of the new version: a default model, Hugging Face id, or local directory."""
    version: str = Field(pattern=VERSION_PATTERN)
    """Name of the new version: lower-case letters, digits and `-`. It must differ from the names of
    earlier rollouts of the pool."""
    checksum: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weight files (`tandem rollout MODEL` computes it). Default: that of the first
    replica."""
    canary: Annotated[tuple[float, ...], AfterValidator(_check_steps)] = (5.0, 25.0, 100.0)
    """Percentages of the sessions that the new version gets, one per step."""
    shadow: bool = False
    """True if the new version first answers copies of requests, whose answers are discarded."""
    min_requests: int = Field(100, ge=10)
    """Smallest number of answers of the new version in a step before the next step."""
    step_s: float = Field(60.0, ge=0)
    """Shortest duration of a step, in seconds."""
    step_timeout_s: float = Field(3600.0, gt=0)
    """Time after which a step without a decision pauses the rollout, in seconds."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """Time in which the first replicas of the new version must be ready, in seconds."""
    max_error_increase: float = Field(0.03, gt=0, lt=1)
    """Limit on the increase of the share of failed requests (0 to 1)."""
    max_slowdown: float = Field(1.25, gt=1)
    """Limit on the 90th percentiles of TTFT and inter-token latency, or of a classifier's latency,
    as a multiple of the old version's."""
    max_length_change: float = Field(0.5, gt=0)
    """Limit on the change of the mean completion tokens, as a share of the old version's."""
    min_agreement: float = Field(0.9, gt=0, le=1)
    """Smallest share (0 to 1) of a classifier's answers with the labels of the old version."""
