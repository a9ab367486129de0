"""One pool of replicas in simulated time, and a policy that decides how many there are.

A replica prefills one prompt after the other and decodes all its requests together; each further
request makes a step longer (the simulated engine's ``batch_slowdown``). A request is laid out when
it arrives, from the requests that its replica has then, so hours take seconds.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.autoscale.traces import Arrival
from cluster.autoscaling import Objective, PoolSignals

TICK_S = 2.0
RATE_WINDOW_S = 6.0
LATENCY_WINDOW_S = 30.0

Policy = Callable[[float, PoolSignals], int]


@dataclass(frozen=True, slots=True)
class Engine:
    """What a replica is like, and what its clients are to see."""

    prefill_s_per_token: float = 2e-4
    decode_s_per_token: float = 0.02
    batch_slowdown: float = 0.03
    startup_s: float = 60.0
    ttft_s: float = 4.0
    itl_s: float = 0.06
    """A request is served well if it waits no longer than these."""


@dataclass(slots=True, eq=False)
class _Replica:
    ready_at: float
    free_at: float = 0.0
    """When its last prefill ends."""
    ends: list[float] = field(default_factory=list)

    def ongoing(self, now: float) -> int:
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        return len(self.ends)


@dataclass(slots=True)
class Outcome:
    """How it went."""

    good: int = 0
    total: int = 0
    replica_s: float = 0.0
    changes: int = 0
    ttfts: list[float] = field(default_factory=list)
    targets: list[tuple[float, int]] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """The share of requests that were served well."""
        return self.good / self.total


class World:
    """A pool with one policy. ``run`` it once."""

    def __init__(self, engine: Engine, policy: Policy, first: int) -> None:
        self._engine = engine
        self._policy = policy
        self._replicas = [_Replica(-math.inf) for _ in range(first)]
        self._draining: list[_Replica] = []
        self._held: deque[Arrival] = deque()
        self._arrived: deque[tuple[float, Arrival]] = deque()
        self._seen: list[tuple[float, float, float]] = []
        """When the first token came, TTFT, ITL: ordered by the first."""
        self._recent: deque[tuple[float, float, float]] = deque()
        self._tokens = [1.0, 0.0, 0.0]
        self.outcome = Outcome()

    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        """Serve them all."""
        tick = TICK_S
        for arrival in arrivals:
            while tick <= arrival.at_s:
                self._decide(tick)
                tick += TICK_S
            self._arrived.append((arrival.at_s, arrival))
            self._place(arrival.at_s, arrival)
        return self.outcome

    def _place(self, now: float, arrival: Arrival) -> None:
        ready = [replica for replica in self._replicas if replica.ready_at <= now]
        if not ready:
            self._held.append(arrival)
            return
        replica = min(ready, key=lambda r: (max(r.free_at, now), r.ongoing(now)))
        engine = self._engine
        slow = 1 + engine.batch_slowdown * replica.ongoing(now)
        began = max(now, replica.free_at)
        replica.free_at = began + arrival.prompt_tokens * engine.prefill_s_per_token * slow
        itl = engine.decode_s_per_token * slow
        heapq.heappush(replica.ends, replica.free_at + arrival.completion_tokens * itl)
        ttft = replica.free_at - arrival.at_s
        heapq.heappush(self._seen, (replica.free_at, ttft, itl))
        outcome = self.outcome
        outcome.total += 1
        outcome.good += ttft <= engine.ttft_s and itl <= engine.itl_s
        outcome.ttfts.append(ttft)

    def _decide(self, now: float) -> None:
        while self._held and any(replica.ready_at <= now for replica in self._replicas):
            self._place(now, self._held.popleft())
        self._draining = [replica for replica in self._draining if replica.ongoing(now)]
        self.outcome.replica_s += TICK_S * (len(self._replicas) + len(self._draining))
        target = self._policy(now, self._signals(now))
        if target != len(self._replicas):
            self.outcome.changes += 1
            self.outcome.targets.append((now, target))
        while len(self._replicas) < target:
            self._replicas.append(_Replica(now + self._engine.startup_s))
        # Serve takes those that still start, then the newest.
        for replica in self._replicas[target:]:
            if replica.ready_at <= now:
                self._draining.append(replica)
        del self._replicas[target:]

    def _signals(self, now: float) -> PoolSignals:
        while self._arrived and self._arrived[0][0] < now - RATE_WINDOW_S:
            self._forget(self._arrived.popleft()[1])
        while self._seen and self._seen[0][0] <= now:
            self._recent.append(heapq.heappop(self._seen))
        while self._recent and self._recent[0][0] < now - LATENCY_WINDOW_S:
            self._recent.popleft()
        rate = len(self._arrived) / min(RATE_WINDOW_S, now)
        count, prompts, completions = self._tokens
        running = [replica for replica in self._replicas if replica.ready_at <= now]
        work_s = sum(max(0.0, replica.free_at - now) for replica in running)
        engine = self._engine
        return PoolSignals(
            target=len(self._replicas),
            running=len(running),
            age_s=1.0,
            requests_per_s=rate,
            prefill_per_s=rate * prompts / count,
            decode_per_s=rate * completions / count,
            ongoing=float(sum(replica.ongoing(now) for replica in running)),
            queued=float(len(self._held)),
            queued_tokens=sum(a.prompt_tokens for a in self._held)
            + work_s / engine.prefill_s_per_token,
            objectives=(
                self._objective("ttft_p90_s", 1, engine.ttft_s / 2),
                self._objective("itl_p90_s", 2, engine.itl_s / 1.2),
            ),
        )

    def _objective(self, name: str, column: int, limit_s: float) -> Objective:
        values = sorted(seen[column] for seen in self._recent)
        observed = values[int(0.9 * (len(values) - 1))] if values else 0.0
        return Objective(name, limit_s, observed, float(len(values)))

    def _forget(self, arrival: Arrival) -> None:
        """Follow the mean lengths, as a router does by the requests that ended."""
        keep = 0.995
        count, prompts, completions = (keep * value for value in self._tokens)
        self._tokens = [
            count + 1,
            prompts + arrival.prompt_tokens,
            completions + arrival.completion_tokens,
        ]
