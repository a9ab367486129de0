"""What is known of a pool when its number of replicas is decided, and what it may have."""

import math
from dataclasses import dataclass, fields

MOST = 1e15
"""Of tokens, requests, seconds; what is more is no measurement, and its square may be infinite."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One service level objective: a percentile of a latency, its limit, what is measured."""

    name: str
    """As in the configuration: ``ttft_p90_s``."""
    limit_s: float
    observed_s: float = 0.0
    """The percentile over the last half minute, of all routers."""
    samples: float = 0.0
    """Observations that it is taken from; too few say nothing."""

    @property
    def ratio(self) -> float:
        """What is measured in units of the limit; above 1 the objective is missed."""
        return self.observed_s / self.limit_s


@dataclass(frozen=True, slots=True)
class PoolSignals:
    """One pool, or the routers, at one moment; sums are over all replicas and all routers."""

    target: int
    """Replicas that were asked for last."""
    running: int
    """Replicas that can answer; the rest of ``target`` is starting."""
    age_s: float = math.inf
    """Since the newest report of a router; inf: none has come."""
    requests_per_s: float = 0.0
    """Requests that arrived, whether they were admitted or not."""
    prefill_per_s: float = 0.0
    """Prompt tokens that arrived and no cache held."""
    decode_per_s: float = 0.0
    """Completion tokens that the arrived requests will take."""
    ongoing: float = 0.0
    """Requests being served."""
    queued: float = 0.0
    """Requests that wait in the routers."""
    queued_tokens: float = 0.0
    """Prompt tokens that wait in the routers and in the engines."""
    kv_usage: float = 0.0
    """KV blocks in use, 0 to 1, mean of the replicas."""
    cores: float = 0.0
    """CPU seconds used each second; known of routers alone."""
    startup_s: float | None = None
    """How long the replicas say that they took to start, until it was measured here."""
    objectives: tuple[Objective, ...] = ()

    @property
    def sane(self) -> bool:
        """Whether every number can be true."""
        values = (getattr(self, field.name) for field in fields(self) if field.name != "age_s")
        numbers = [value for value in values if isinstance(value, float)]
        latencies = [n for o in self.objectives for n in (o.observed_s, o.samples)]
        return self.age_s >= 0 and all(0 <= n <= MOST for n in (*numbers, *latencies))


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What one pool may have, and what one replica of it takes."""

    min: int = 1
    max: int = 1
    cpus: float = 0.0
    gpus: float = 0.0
    """Of one replica with all its workers."""
    priority: int = 0
    """Where the budget does not suffice, the pool with the higher number goes first."""
    target_in_flight: float = 32.0
    """Ongoing requests for each replica, until its capacity is learned."""
    max_in_flight: float = math.inf
    """Requests that one replica is given at a time."""
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 120.0
    is_router: bool = False

    def bounded(self, replicas: int) -> int:
        """``replicas``, but not below the floor or above the ceiling."""
        return max(self.min, min(self.max, replicas))
