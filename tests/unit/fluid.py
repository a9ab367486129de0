"""Fluid model of a pool: work flows in and is worked off; latency grows as 1 / (1 - load)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.autoscaling import Autoscaler, Objective, PoolSignals, PoolSpec

STEP_S = 2.0
PROMPT, COMPLETION = 500.0, 100.0


@dataclass
class FluidPool:
    """One pool whose replicas each serve at most ``rate`` requests/s."""

    spec: PoolSpec
    rate: float = 10.0
    base_s: float = 0.3
    startup_s: float = 30.0
    limit_s: float = 2.0
    target: int = 1
    now: float = 1000.0
    backlog: float = 0.0
    targets: list[int] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    replica_s: float = 0.0

    def __post_init__(self) -> None:
        self.autoscaler = Autoscaler({"pool": self.spec})
        self.ready_at = [self.now] * self.target

    @property
    def running(self) -> int:
        return sum(at <= self.now for at in self.ready_at)

    def run(self, seconds: float, arrivals: Callable[[float], float]) -> None:
        """Run for a while; ``arrivals`` gives requests/s by the time since the start of the run."""
        began = self.now
        while self.now - began < seconds:
            self.step(arrivals(self.now - began))

    def step(self, arriving: float) -> None:
        self.now += STEP_S
        capacity = self.running * self.rate
        work = self.backlog + arriving * STEP_S
        served = min(work, capacity * STEP_S)
        self.backlog = work - served
        load = min(0.99, arriving / capacity) if capacity else 0.99
        waiting_s = self.backlog / capacity if capacity else math.inf
        ttft = min(60.0, self.base_s / (1 - load) + waiting_s)
        self.ttfts.append(ttft)
        self.replica_s += len(self.ready_at) * STEP_S
        signals = PoolSignals(
            target=self.target,
            running=self.running,
            age_s=1.0,
            requests_per_s=arriving,
            prefill_per_s=arriving * PROMPT,
            decode_per_s=arriving * COMPLETION,
            in_flight=min(arriving * ttft, 1e4),
            queued=self.backlog,
            queued_tokens=self.backlog * PROMPT,
            startup_s=self.startup_s,
            objectives=(Objective("ttft_p90_s", self.limit_s, ttft, arriving * 30),),
        )
        self.apply(self.autoscaler.decide(self.now, {"pool": signals})["pool"].target)

    def apply(self, target: int) -> None:
        self.target = target
        self.targets.append(target)
        started = [self.now + self.startup_s] * (target - len(self.ready_at))
        self.ready_at = (self.ready_at + started)[:target]
