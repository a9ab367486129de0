"""Settings of a simulation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cluster.admission.fair_queue import QueueLimits
from cluster.autoscaling import Decision, PoolSignals
from cluster.config import SimConfig
from cluster.routing import BreakerLimits, Policy, PrefixIndex, RequestView

CachedTokens = Callable[[str, RequestView], float]
"""Prompt tokens that a replica really has cached or is computing, which no router knows."""
MakePolicy = Callable[[PrefixIndex, CachedTokens, int], Policy]
"""Factory of one router's policy from its index, the real cache contents and a seed."""
ScalingPolicy = Callable[[float, PoolSignals], Decision]
"""Decision at a time in seconds."""

LARGE_GPU = SimConfig(
    prefill_s_per_token=1e-4,
    decode_s_per_token=0.012,
    batch_slowdown=0.015,
    num_kv_blocks=12_500,
    startup_s=60.0,
)
"""Default engine: about an 8B model on one large GPU (10,000 prompt tokens/s, 80 tokens/s of one
stream, KV memory for 400,000 tokens). A guess."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Failure of one replica."""

    at_s: float
    replica: int
    """Number of the replica in the order of the starts."""
    kind: Literal["die", "hang", "slow"]
    factor: float = 10.0
    """Slowdown of a slow replica."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives of each request; inf: no objective."""

    ttft_s: float = 2.0
    itl_s: float = 0.2
    """Mean over the request's tokens."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Autoscaling of the pool."""

    policy: ScalingPolicy
    slo: Slo | None = None
    """Objectives of the policy, each for 90 % of the requests; None: those of ``Settings``."""
    every_s: float = 2.0
    """Interval of the decisions."""
    rate_window_s: float = 6.0
    """Window of rates in a router's report."""
    latency_window_s: float = 30.0
    """Window of latencies in a router's report."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One pool and its routers."""

    engine: SimConfig
    replicas: int
    """Replicas that are ready at the start."""
    policy: MakePolicy
    scaling: Scaling | None = None
    """None: a fixed number of replicas; dead ones are replaced."""
    faults: tuple[Fault, ...] = ()
    slo: Slo = field(default_factory=Slo)
    max_in_flight: int = 256
    """Limit of one replica's requests in flight."""
    queue: QueueLimits = field(default_factory=lambda: QueueLimits(float("inf"), 1024))
    """Limits of each router's queue."""
    queue_timeout_s: float = 60.0
    start_timeout_s: float | None = None
    """Queue timeout while no replica is ready, for a pool that can scale to zero."""
    breaker: BreakerLimits | None = None
    """Circuit breakers of the routers; None: circuits stay closed."""
    routers: int = 1
    hop_s: float = 0.001
    """Time that router and link add to the time to first token."""
    report_s: float = 1.0
    """Interval of the replicas' load reports."""
    event_delay_s: float = 0.05
    """Delay until a router knows about a stored or evicted block."""
    detect_s: float = 30.0
    """Time until a hanging replica is detected and ended."""
    seed: int = 0
