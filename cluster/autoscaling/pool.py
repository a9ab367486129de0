"""Replicas that one pool requires, and why.

Keeps what is learned about the pool: forecasts of its rates, the capacity of its replicas, its
start-up time, and the numbers wanted recently. Does not know other pools or the budget.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from cluster.autoscaling.forecast import Forecast
from cluster.autoscaling.replica_capacity import MIN_SAMPLES, ReplicaCapacity, relative_load
from cluster.autoscaling.signals import PoolSignals, PoolSpec
from cluster.autoscaling.starts import ScaleUpTracker

STALE_S = 30.0
"""Age from which reports are ignored; they come every few seconds."""
REPORT_DELAY_S = 5.0
"""Time from an arrival to the decision that knows about it."""
DEFAULT_STARTUP_S = 30.0
DRAIN_S = 120.0
"""Time in which a queue is to be worked off; starting replicas contribute as well."""
FULL = 0.9
"""Planned share of a hard limit (KV cache, requests in flight)."""
ROUTER_CORES = 0.7
"""Planned share of the one core that a router's event loop can use."""
MAX_GROWTH = 3.0
"""Limit of one step, as a multiple of the running replicas, before their capacity is known: a queue
that a few replicas built up while others start says nothing about how many are required."""
DOWN_SLACK = 0.1
"""Extra load that the remaining replicas must bear before one is removed, as a share."""
NO_GAIN = "no_gain"
"""Cause: an objective is missed, but the last replica that was added did not help."""
HELPED = 0.9
"""Latency after adding replicas, relative to before, above which adding more is not tried."""
FAILURE_S = 1800.0
"""Time for which a load that was too much for a replica is not tried again."""
SETTLED_S = 30.0
"""Time after a change in which latencies, which span half a minute, belong to the past."""
_NO_FAILURE = (-math.inf, (0.0, 0.0))


class Requirement(NamedTuple):
    """One reason to have replicas."""

    cause: str
    replicas: float
    text: str
    slack: float = DOWN_SLACK
    """Extra load to allow for before scaling down, as a share."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Number of replicas of one pool, with its explanation."""

    target: int
    wanted: int
    """Number that the pool would get if it were alone."""
    cause: str
    """One word, for a metric."""
    reason: str
    """A sentence, for a log."""


class PoolScaler:
    """Decisions for one pool over time."""

    def __init__(self, spec: PoolSpec) -> None:
        self.spec = spec
        self.prefill, self.decode, self.requests = Forecast(), Forecast(), Forecast()
        self.capacity = ReplicaCapacity()
        self.startup_s: float | None = None
        """Measured time from a decision to the replicas that serve."""
        self._reported_startup_s = DEFAULT_STARTUP_S
        self._scale_ups = ScaleUpTracker()
        self._wanted: deque[tuple[float, int]] = deque()  # (time, replicas) of recent decisions
        self._decided_at = -math.inf
        self._restarted_at = math.inf
        # The last change of the running replicas.
        self._running = -1
        self._running_changed_at = -math.inf
        self._queued_tokens = 0.0
        # Running replicas and latency ratio when an objective was last missed.
        self._missed = (0, math.inf)
        # Why no replica is added although an objective is missed; "" if there is no such reason.
        self._no_gain = ""
        # Time and load of a replica (prefill, decode) of the last missed objective.
        self._failure = _NO_FAILURE

    def decide(self, now: float, signals: PoolSignals) -> Decision:
        """Return the decision for ``signals`` at ``now`` (seconds) if the pool were alone."""
        if not 0 <= now - self._decided_at <= STALE_S:
            self._restart(now)
        self._decided_at = now
        if not signals.is_plausible or signals.age_s > STALE_S:
            self._restart(now)
            reason = "no trustworthy report; nothing changes"
            return Decision(signals.target, signals.target, "stale", reason)
        self._learn(now, signals)
        return self._apply_delays(now, signals, self._requirements(now, signals))

    @property
    def horizon_s(self) -> float:
        """Time ahead for which replicas are requested: a start-up and the delay of reports."""
        return (self.startup_s or self._reported_startup_s) + REPORT_DELAY_S

    # -- learning --

    def _restart(self, now: float) -> None:
        """Restart delays after a clock jump or a long silence."""
        self._wanted.clear()
        self._running_changed_at = self._restarted_at = now
        self._scale_ups = ScaleUpTracker()
        self._failure = _NO_FAILURE

    def _learn(self, now: float, signals: PoolSignals) -> None:
        self._measure_startup(now, signals)
        horizon_s = self.horizon_s
        self.prefill.update(now, signals.prefill_per_s, horizon_s)
        self.decode.update(now, signals.decode_per_s, horizon_s)
        self.requests.update(now, signals.requests_per_s, horizon_s)
        if signals.running != self._running:
            self._running, self._running_changed_at = signals.running, now
        # While a queue shrinks, latencies belong to the past and not to the present load.
        is_recovering = 0 < signals.queued_tokens <= self._queued_tokens
        self._queued_tokens = signals.queued_tokens
        if signals.running and self._has_settled(now) and not is_recovering:
            self.capacity.observe(
                now,
                self.prefill.recent / signals.running,
                self.decode.recent / signals.running,
                signals.objectives,
            )

    def _measure_startup(self, now: float, signals: PoolSignals) -> None:
        self._reported_startup_s = signals.startup_s or self._reported_startup_s
        scale_up = self._scale_ups.follow(now, signals.target, signals.running)
        if scale_up is not None:
            took_s = now - scale_up.at
            known_s = took_s if self.startup_s is None else self.startup_s
            self.startup_s = 0.5 * (known_s + took_s)

    def _has_settled(self, now: float) -> bool:
        return now - self._running_changed_at >= SETTLED_S

    # -- reasons to have replicas --

    def _requirements(self, now: float, signals: PoolSignals) -> list[Requirement]:
        self._no_gain = ""
        if self.spec.is_router:
            text = f"{signals.cores:.2f} cores are used"
            return [
                Requirement("cpu", signals.cores / ROUTER_CORES, text),
                self._by_in_flight(signals),
            ]
        if not (signals.requests_per_s or signals.in_flight or signals.queued):
            # Forecasts keep no replica without traffic, so a pool can scale to zero.
            return [Requirement("busy", 0.0, "there are no requests")]
        required = [*self._by_forecast(signals), self._by_max_in_flight(signals)]
        if signals.kv_usage > FULL:
            replicas = signals.running * signals.kv_usage / FULL
            text = f"the KV caches are {signals.kv_usage:.0%} full"
            required.append(Requirement("kv", replicas, text))
        # In this order: a missed objective is also a failure.
        missed = self._by_missed_objective(now, signals), self._by_failure(now, signals)
        required += [each for each in missed if each is not None]
        return [*required, Requirement("busy", 0.5, "there are requests")]

    def _by_forecast(self, signals: PoolSignals) -> list[Requirement]:
        """Require replicas for the expected tokens, by their learned capacity."""
        horizon_s = self.horizon_s
        prefill, decode = self.prefill.ahead(horizon_s), self.decode.ahead(horizon_s)
        prefill += signals.queued_tokens / DRAIN_S
        found = self.capacity.required(prefill, decode)
        if found is None:
            proven = self.capacity.proven_replicas(prefill, decode)
            return [self._by_growth(signals), self._by_proven_load(signals, proven)]
        text = (
            f"in {horizon_s:.0f} s {prefill:.0f} prompt and {decode:.0f} completion tokens/s"
            f" at {found.objective}, {signals.queued_tokens:.0f} tokens are queued"
        )
        # By the present load: a forecast's margin is not seen while there is room for it.
        proven = found.proven_replicas(self.prefill.steady, self.decode.steady)
        return [
            Requirement("forecast", found.replicas, text),
            self._by_proven_load(signals, proven),
        ]

    def _by_proven_load(self, signals: PoolSignals, proven: float) -> Requirement:
        """Scale down by single steps; each shows what a replica bears before the next."""
        text = "scale-down limited to slightly more load per replica than proven"
        return Requirement("learning", min(proven, signals.running - 1.0), text, slack=0.0)

    def _by_failure(self, now: float, signals: PoolSignals) -> Requirement | None:
        """Keep the replica count after a recent failed scale-down."""
        failed_at, failed_rates = self._failure
        if now - failed_at > FAILURE_S:
            return None
        rates = self.prefill.steady, self.decode.steady
        text = "an objective was recently missed at this load of a replica"
        required = relative_load(rates, failed_rates) * (1 + DOWN_SLACK / 2)
        return Requirement("missed", min(required, float(signals.running)), text, slack=0.0)

    def _by_growth(self, signals: PoolSignals) -> Requirement:
        """Require ``target_in_flight`` per replica in limited steps, until capacity is learned."""
        rate = self.requests.recent
        growth = self.requests.ahead(self.horizon_s) / rate if rate > 0 else 1.0
        required = self._by_in_flight(signals)
        cap = max(1.0, signals.running * MAX_GROWTH)
        text = f"{required.text}, {growth:.2f} times as many in {self.horizon_s:.0f} s"
        return required._replace(replicas=min(required.replicas * growth, cap), text=text)

    def _by_in_flight(self, signals: PoolSignals) -> Requirement:
        num_requests = signals.in_flight + signals.queued
        text = f"{num_requests:.0f} requests, {self.spec.target_in_flight:g} per replica"
        return Requirement("in_flight", num_requests / self.spec.target_in_flight, text)

    def _by_max_in_flight(self, signals: PoolSignals) -> Requirement:
        limit = self.spec.max_in_flight
        replicas = (signals.in_flight + signals.queued) / (FULL * limit)
        return Requirement("limit", replicas, f"a replica may have {limit:g} requests in flight")

    def _by_missed_objective(self, now: float, signals: PoolSignals) -> Requirement | None:
        """Add replicas if an objective is missed while all run: what was learned is wrong.

        If that did not help the last time, the objective cannot be met by adding replicas.
        """
        trusted = [o for o in signals.objectives if o.samples >= MIN_SAMPLES]
        worst = max(trusted, key=lambda o: o.ratio, default=None)
        if worst is None or worst.ratio <= 1 or signals.running < signals.target:
            return None
        if not self._has_settled(now):
            return None
        text = f"{worst.name} is {worst.observed_s:.3g} s, its limit is {worst.limit_s:g} s"
        replicas, ratio = self._missed
        has_helped = worst.ratio <= HELPED * ratio or signals.queued_tokens
        if signals.running > replicas and not has_helped:
            self._no_gain = f"{text}; {signals.running} replicas instead of {replicas} did not help"
            return None
        if signals.running != replicas:
            self._missed = signals.running, worst.ratio
        rates = self.prefill.steady / signals.running, self.decode.steady / signals.running
        self._failure = now, rates
        more = signals.running * min(1.5, max(1.1, worst.ratio**0.5))
        return Requirement("missed", more, text)

    # -- delays --

    def _apply_delays(
        self, now: float, signals: PoolSignals, required: list[Requirement]
    ) -> Decision:
        """Scale up after the upscale delay, down after the downscale delay."""
        spec, target = self.spec, signals.target
        highest = max(required, key=lambda each: each.replicas)
        up = spec.clamp(round_up(highest.replicas))
        down = spec.clamp(max(round_up(each.replicas * (1 + each.slack)) for each in required))
        wanted = up if up > target else min(target, down)
        self._wanted.append((now, wanted))
        longest_s = max(spec.upscale_delay_s, spec.downscale_delay_s)
        while self._wanted[0][0] < now - longest_s:
            self._wanted.popleft()
        if wanted > target:
            delay_s = spec.upscale_delay_s if target else 0.0  # from zero at once
            steady = max(target, min(self._wanted_within(now, delay_s)))
        else:
            delay_s = spec.downscale_delay_s
            steady = min(target, max(self._wanted_within(now, delay_s)))
        if steady == target or now - self._restarted_at < delay_s:
            if self._no_gain and wanted <= target:
                return Decision(target, target, NO_GAIN, self._no_gain)
            return Decision(target, target, "steady", highest.text)
        return Decision(steady, steady, highest.cause, highest.text)

    def _wanted_within(self, now: float, delay_s: float) -> list[int]:
        return [wanted for at, wanted in self._wanted if at >= now - delay_s]


def round_up(replicas: float) -> int:
    """Return the next integer, with a tolerance for rounding errors."""
    return math.ceil(replicas - 1e-9)
