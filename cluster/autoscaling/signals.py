"""Signals of a pool, from which its number of replicas is decided, and its specification."""

import math
from dataclasses import dataclass, fields

MAX_PLAUSIBLE = 1e15
"""Bound of tokens, requests and seconds; larger numbers are not measurements, and their squares may
overflow."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A service level objective: a percentile of a latency, its limit and its measurement."""

    name: str
    """Name in the configuration, such as ``ttft_p90_s``."""
    limit_s: float
    observed_s: float = 0.0
    """Percentile over the last half minute and all routers."""
    samples: float = 0.0
    """Number of observations behind ``observed_s``."""

    @property
    def ratio(self) -> float:
        """Measurement in units of the limit; above 1 the objective is missed."""
        return self.observed_s / self.limit_s


@dataclass(frozen=True, slots=True)
class PoolSignals:
    """State of one pool, or of the routers; sums are over all replicas and all routers."""

    target: int
    """Replicas requested last."""
    running: int
    """Replicas that can serve; the rest of ``target`` is starting."""
    age_s: float = math.inf
    """Age of the newest router report; inf if no report came."""
    requests_per_s: float = 0.0
    """Arriving requests, rejected ones included."""
    prefill_per_s: float = 0.0
    """Arriving prompt tokens that no cache holds."""
    decode_per_s: float = 0.0
    """Expected completion tokens of the arriving requests."""
    in_flight: float = 0.0
    """Requests at the replicas."""
    queued: float = 0.0
    """Requests that wait in the routers."""
    queued_tokens: float = 0.0
    """Prompt tokens that wait in the routers and in the engines."""
    kv_usage: float = 0.0
    """KV blocks in use, 0 to 1, mean of the replicas."""
    cores: float = 0.0
    """CPU seconds used per second; only known for routers."""
    startup_s: float | None = None
    """Start-up time that the replicas report; used until it was measured here."""
    objectives: tuple[Objective, ...] = ()
    core_limit: int | None = None
    """Replicas that can compute without sharing cores; None if CPUs are not what computes."""

    @property
    def is_plausible(self) -> bool:
        """True if every number can be a measurement."""
        values = (getattr(self, field.name) for field in fields(self) if field.name != "age_s")
        numbers = [value for value in values if isinstance(value, float)]
        latencies = [n for o in self.objectives for n in (o.observed_s, o.samples)]
        return self.age_s >= 0 and all(0 <= n <= MAX_PLAUSIBLE for n in (*numbers, *latencies))


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Bounds of one pool, and the resources of one of its replicas."""

    min: int = 1
    max: int = 1
    cpus: float = 0.0
    """CPU cores of one replica, all its workers included."""
    gpus: float = 0.0
    """GPUs of one replica, all its workers included."""
    priority: int = 0
    """Order in which pools share the budget; the highest number first."""
    target_in_flight: float = 32.0
    """Requests per replica until the replica's capacity is learned."""
    max_in_flight: float = math.inf
    """Limit of one replica's requests in flight."""
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 120.0
    is_router: bool = False
    fills_nodes: bool = False
    """True if one replica computes on all cores of its node by default."""

    def clamp(self, replicas: int) -> int:
        return max(self.min, min(self.max, replicas))
