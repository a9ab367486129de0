"""How many replicas one pool wants, and why.

Owns what is learned of the pool: its forecast, its capacity, how long it takes to start, and the
numbers it wanted lately. Knows nothing of other pools or of the budget.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from cluster.autoscaling.capacity import MIN_SAMPLES, Capacity
from cluster.autoscaling.forecast import Forecast
from cluster.autoscaling.signals import PoolSignals, PoolSpec
from cluster.autoscaling.starts import Rises

STALE_S = 30.0
"""Reports come every few seconds; without one for so long nothing is known."""
REPORT_DELAY_S = 5.0
"""From an arrival to the decision that knows of it."""
DEFAULT_STARTUP_S = 30.0
DRAIN_S = 120.0
"""The time in which what is queued shall be worked off; those that start already do so too."""
FULL = 0.9
"""The share of a hard limit (KV cache, requests at a time) that is planned."""
ROUTER_CORES = 0.7
"""Of the one core that a router's event loop can use."""
MAX_GROWTH = 3.0
"""Times the replicas that run, while it is not known what one carries: a queue that a few
replicas built up while others start says nothing of how many are needed."""
DOWN_SLACK = 0.1
"""A replica goes only if a tenth more work would not need it."""
HELPED = 0.9
"""What more replicas must have left of a latency for still more to be tried."""
FAILURE_S = 1800.0
"""So long a load that was too much is not tried again."""
SETTLED_S = 30.0
"""Latencies are of the last half minute: so long after a change they say nothing of what is."""


class Need(NamedTuple):
    """One reason to have replicas."""

    cause: str
    replicas: float
    text: str
    slack: float = DOWN_SLACK


@dataclass(frozen=True, slots=True)
class Want:
    """A number of replicas, in words too."""

    replicas: int
    cause: str
    """One word, for a metric."""
    reason: str
    """A sentence, for a log."""


class PoolScaler:
    """Decides for one pool, again and again."""

    def __init__(self, spec: PoolSpec) -> None:
        self.spec = spec
        self.prefill, self.decode, self.requests = Forecast(), Forecast(), Forecast()
        self.capacity = Capacity()
        self._said_s = DEFAULT_STARTUP_S
        self.startup_s: float | None = None
        """From the decision to the replicas that answer, as measured."""
        self._rises = Rises()
        self._wants: deque[tuple[float, int]] = deque()
        self._changed_at = -math.inf
        self._replicas = -1
        self._decided_at = -math.inf
        self._since = math.inf
        self._missed = (0, math.inf)
        self._queued_tokens = 0.0
        self._too_much = (-math.inf, (0.0, 0.0))

    def want(self, now: float, signals: PoolSignals) -> Want:
        """The number of replicas for ``signals`` at ``now`` (seconds)."""
        if not 0 <= now - self._decided_at <= STALE_S:
            self._start_anew(now)
        self._decided_at = now
        if not signals.sane or signals.age_s > STALE_S:
            self._start_anew(now)
            return Want(signals.target, "stale", "no report that can be trusted: nothing changes")
        self._learn(now, signals)
        return self._steady(now, signals, self._needs(now, signals))

    def _start_anew(self, now: float) -> None:
        """The clock jumped, or nothing was heard for long: delays begin again."""
        self._wants.clear()
        self._changed_at = self._since = now
        self._rises = Rises()
        self._too_much = (-math.inf, (0.0, 0.0))

    def _learn(self, now: float, signals: PoolSignals) -> None:
        self._follow_start(now, signals)
        horizon = self.horizon_s
        self.prefill.update(now, signals.prefill_per_s, horizon)
        self.decode.update(now, signals.decode_per_s, horizon)
        self.requests.update(now, signals.requests_per_s, horizon)
        if signals.running != self._replicas:
            self._replicas, self._changed_at = signals.running, now
        # While a queue is worked off, latencies tell of the past and not of the load.
        relieved = 0 < signals.queued_tokens <= self._queued_tokens
        self._queued_tokens = signals.queued_tokens
        if signals.running and now - self._changed_at >= SETTLED_S and not relieved:
            self.capacity.observe(
                now,
                self.prefill.recent / signals.running,
                self.decode.recent / signals.running,
                signals.objectives,
            )

    def _follow_start(self, now: float, signals: PoolSignals) -> None:
        """Measure from a target that rose until so many answer."""
        self._said_s = signals.startup_s or self._said_s
        rise = self._rises.follow(now, signals.target, signals.running)
        if rise is not None:
            took_s = now - rise.at
            known_s = took_s if self.startup_s is None else self.startup_s
            self.startup_s = 0.5 * (known_s + took_s)

    @property
    def horizon_s(self) -> float:
        """How far ahead replicas must be asked for: as long as a start takes to be noticed."""
        return (self.startup_s or self._said_s) + REPORT_DELAY_S

    def _needs(self, now: float, signals: PoolSignals) -> list[Need]:
        """Each reason to have replicas."""
        if self.spec.is_router:
            cores = f"{signals.cores:.2f} cores are used"
            return [
                Need("cpu", signals.cores / ROUTER_CORES, cores),
                self._by_ongoing(signals),
            ]
        asked_for = signals.requests_per_s or signals.ongoing or signals.queued
        if not asked_for:  # through the whole delay: what was and may come keeps no replica
            return [Need("busy", 0.0, "nothing is asked for")]
        needs = [*self._by_load(signals), self._by_limit(signals)]
        if signals.kv_usage > FULL:
            full = signals.running * signals.kv_usage / FULL
            needs.append(Need("kv", full, f"the KV caches are {signals.kv_usage:.0%} full"))
        seen = self._by_missed(now, signals), self._by_failure(now, signals)
        needs += [need for need in seen if need is not None]
        return [*needs, Need("busy", 0.5, "there are requests")]

    def _by_load(self, signals: PoolSignals) -> list[Need]:
        """By the tokens that are coming and the replicas that those were seen to take."""
        horizon = self.horizon_s
        prefill, decode = self.prefill.ahead(horizon), self.decode.ahead(horizon)
        prefill += signals.queued_tokens / DRAIN_S
        found = self.capacity.needed(prefill, decode)
        if found is None:
            least = self.capacity.least(prefill, decode)
            return [self._by_little(signals), self._by_proof(signals, least)]
        text = (
            f"in {horizon:.0f} s {prefill:.0f} prompt and {decode:.0f} completion tokens/s"
            f" at {found.objective}, {signals.queued_tokens:.0f} tokens are queued"
        )
        # By what is and not by what may come: that would never be seen while there is room for it.
        rates = self.prefill.steady, self.decode.steady
        proof = self._by_proof(signals, found.proven(*rates))
        return [Need("forecast", found.replicas, text), proof]

    def _by_proof(self, signals: PoolSignals, proven: float) -> Need:
        """Fewer only step by step: each step shows what a replica bears before the next."""
        text = "a replica is not given much more than it was seen to bear"
        return Need("learning", min(proven, signals.running - 1.0), text, slack=0.0)

    def _by_failure(self, now: float, signals: PoolSignals) -> Need | None:
        """Those that run, where fewer were too few a while ago: that is not tried again at once."""
        at, each = self._too_much
        if now - at > FAILURE_S:
            return None
        rates = self.prefill.steady, self.decode.steady
        loads = [rate / one for rate, one in zip(rates, each, strict=True) if one > 0]
        text = "an objective was missed at this load of a replica lately"
        needed = max(loads, default=0.0) * (1 + DOWN_SLACK / 2)
        return Need("missed", min(needed, float(signals.running)), text, slack=0.0)

    def _by_little(self, signals: PoolSignals) -> Need:
        """By the configured number of requests, in steps, until what a replica bears is known."""
        level = self.requests.recent
        growth = self.requests.ahead(self.horizon_s) / level if level > 0 else 1.0
        need = self._by_ongoing(signals)
        most = max(1.0, signals.running * MAX_GROWTH)
        text = f"{need.text}, {growth:.2f} times as many in {self.horizon_s:.0f} s"
        return need._replace(replicas=min(need.replicas * growth, most), text=text)

    def _by_ongoing(self, signals: PoolSignals) -> Need:
        """By the configured number of requests for each replica."""
        ongoing = signals.ongoing + signals.queued
        text = f"{ongoing:.0f} requests of {self.spec.target_in_flight:g} each"
        return Need("ongoing", ongoing / self.spec.target_in_flight, text)

    def _by_limit(self, signals: PoolSignals) -> Need:
        full = (signals.ongoing + signals.queued) / (FULL * self.spec.max_in_flight)
        return Need(
            "limit", full, f"a replica takes {self.spec.max_in_flight:g} requests at a time"
        )

    def _by_missed(self, now: float, signals: PoolSignals) -> Need | None:
        """More where an objective is missed though all replicas run: what was learned is wrong.

        Where that did not help the last time, the objective is beyond what replicas can do.
        """
        trusted = [o for o in signals.objectives if o.samples >= MIN_SAMPLES]
        worst = max(trusted, key=lambda o: o.ratio, default=None)
        settled = now - self._changed_at >= SETTLED_S
        if worst is None or worst.ratio <= 1 or signals.running < signals.target or not settled:
            return None
        replicas, ratio = self._missed
        helped = worst.ratio <= HELPED * ratio or signals.queued_tokens
        if signals.running > replicas and not helped:
            return None
        if signals.running != replicas:
            self._missed = signals.running, worst.ratio
        each = self.prefill.steady / signals.running, self.decode.steady / signals.running
        self._too_much = now, each
        more = signals.running * min(1.5, max(1.1, worst.ratio**0.5))
        text = f"{worst.name} is {worst.observed_s:.3g} s of {worst.limit_s:g} s"
        return Need("missed", more, text)

    def _steady(self, now: float, signals: PoolSignals, needs: list[Need]) -> Want:
        """Up when it was wanted all through one delay, down when through the other."""
        spec, target = self.spec, signals.target
        most = max(needs, key=lambda need: need.replicas)
        up = spec.bounded(whole(most.replicas))
        down = spec.bounded(max(whole(need.replicas * (1 + need.slack)) for need in needs))
        wanted = up if up > target else min(target, down)
        self._wants.append((now, wanted))
        longest = max(spec.upscale_delay_s, spec.downscale_delay_s)
        while self._wants[0][0] < now - longest:
            self._wants.popleft()
        if wanted > target:
            delay_s = spec.upscale_delay_s if target else 0.0
            steady = max(target, min(self._lately(now, delay_s)))
        else:
            delay_s = spec.downscale_delay_s
            steady = min(target, max(self._lately(now, delay_s)))
        if steady == target or now - self._since < delay_s:
            return Want(target, "steady", most.text)
        return Want(steady, most.cause, most.text)

    def _lately(self, now: float, delay_s: float) -> list[int]:
        return [wanted for at, wanted in self._wants if at >= now - delay_s]


def whole(replicas: float) -> int:
    """Rounded up, but for what floats add."""
    return math.ceil(replicas - 1e-9)
