"""What is simulated."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cluster.admission.fair_queue import QueueLimits
from cluster.autoscaling import Decision, PoolSignals
from cluster.config import SimConfig
from cluster.routing import Policy, PrefixIndex, RequestView

CachedTokens = Callable[[str, RequestView], float]
"""Prompt tokens that a replica has or is computing: the truth, which no router knows."""
MakePolicy = Callable[[PrefixIndex, CachedTokens, int], Policy]
"""Makes one router's policy from its index, the truth and a seed."""
ScalingPolicy = Callable[[float, PoolSignals], Decision]
"""What is decided at a time in seconds."""

LARGE_GPU = SimConfig(
    prefill_s_per_token=1e-4,
    decode_s_per_token=0.012,
    batch_slowdown=0.015,
    num_kv_blocks=12_500,
    startup_s=60.0,
)
"""An engine for where nothing is said of one: about an 8 B model on one large GPU (10,000 prompt
tokens/s, 80 tokens/s of one stream, KV memory for 400,000 tokens); a guess."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls one replica, by its number in the order of the starts."""

    at_s: float
    replica: int
    kind: Literal["die", "hang", "slow"]
    factor: float = 10.0
    """How much slower a slow one gets."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a client is to see; inf: no objective."""

    ttft_s: float = 2.0
    itl_s: float = 0.2
    """The mean of a stream."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How replicas come and go."""

    policy: ScalingPolicy
    slo: Slo | None = None
    """The objectives that the policy is told, each for nine tenths; None: those of ``Settings``."""
    every_s: float = 2.0
    """Between two decisions."""
    rate_window_s: float = 6.0
    latency_window_s: float = 30.0
    """What a router's report looks back at."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One pool and what is before it."""

    engine: SimConfig
    replicas: int
    """At the beginning, ready at once."""
    policy: MakePolicy
    scaling: Scaling | None = None
    """None: replicas stay as they are; dead ones are replaced."""
    faults: tuple[Fault, ...] = ()
    slo: Slo = field(default_factory=Slo)
    max_in_flight: int = 256
    """Requests that one replica is given at a time."""
    queue: QueueLimits = field(default_factory=lambda: QueueLimits(float("inf"), 1024))
    """Of each router."""
    queue_timeout_s: float = 60.0
    start_timeout_s: float | None = None
    """The same while no replica is ready, of a pool that may have none."""
    routers: int = 1
    hop_s: float = 0.001
    """What the router and the link add to the time to the first token."""
    report_s: float = 1.0
    """Between two reports of a replica's load."""
    event_delay_s: float = 0.05
    """Until a router knows of a block that was stored or removed."""
    detect_s: float = 30.0
    """Until a replica that hangs is found and ended."""
    seed: int = 0
