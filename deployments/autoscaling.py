"""The autoscaling policy of a Tandem application, as Ray Serve's controller calls it.

Owns what is learned of the pools (``cluster.autoscaling``) between the calls. It must never raise
and must import neither torch nor vllm: an exception would stop the controller's loop for all
applications. Each deployment's ``policy_kwargs`` tell what it is (``settings``).
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingContext

from cluster.autoscaling import Autoscaler, Decision, PoolSignals, TargetChange
from cluster.autoscaling.pool import STALE_S
from cluster.autoscaling.reports import LoadReport, merge, parse_reports
from cluster.autoscaling.settings import PoolSettings
from cluster.autoscaling.starts import Start, StartWatch
from cluster.metrics import Registry, table
from deployments.decisions import DecisionLog
from deployments.metrics import RayMetrics

logger = logging.getLogger("ray.serve.tandem")

ONGOING = "ongoing"
CREATED, STARTUP = "created_at", "startup_s"
"""The names under which a replica reports its requests, when its process was made (Unix time) and
how long it took from there until it could answer."""
DECIDE_S = 2.0
"""The controller asks ten times a second; reports come as often as this."""
Heard = list[tuple[float, dict[str, float]]]
"""What each replica of a deployment said last, with its age in seconds."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One deployment in one call."""

    context: AutoscalingContext
    settings: PoolSettings

    @classmethod
    def of(cls, context: AutoscalingContext) -> "_Part":
        settings = PoolSettings.decoded(context.config.policy.policy_kwargs)
        spec = replace(
            settings.spec,
            min=context.capacity_adjusted_min_replicas,
            max=context.capacity_adjusted_max_replicas,
        )
        return cls(context, replace(settings, spec=spec))

    @property
    def pool(self) -> str:
        return self.settings.pool


@dataclass(slots=True)
class _Hearing:
    """When each source was last heard: by this process' clock, as others may be wrong."""

    seen: dict[Any, tuple[float, float]] = field(default_factory=dict)

    def fresh(
        self, now: float, context: AutoscalingContext
    ) -> dict[Any, tuple[float, dict[str, float]]]:
        """The newest values of each replica that was heard lately, with their age in seconds."""
        values: dict[Any, dict[str, float]] = {}
        newest: dict[Any, float] = {}
        for name, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if series:
                    values.setdefault(replica, {})[name] = series[-1].value
                    newest[replica] = max(newest.get(replica, 0.0), series[-1].timestamp)
        for replica, stamp in newest.items():
            if self.seen.get(replica, (None,))[0] != stamp:
                self.seen[replica] = stamp, now
        # Serve keeps the last report of a replica that has fallen silent, so it is known here too.
        self.seen = {r: s for r, s in self.seen.items() if r in newest or now - s[1] < 10 * STALE_S}
        ages = {replica: now - self.seen[replica][1] for replica in newest}
        return {r: (age, values[r]) for r, age in ages.items() if age <= STALE_S}


class ApplicationPolicy:
    """Decides for all deployments of an application at once: its ``autoscaling_policy``."""

    def __init__(self) -> None:
        self._autoscaler: Autoscaler | None = None
        self._made_of: Any = None
        self._decided_at = -DECIDE_S
        self._hearing = _Hearing()
        self._starts: dict[str, StartWatch] = {}
        registry = Registry()
        self._registry, self._metrics = registry, RayMetrics(registry)
        self._log = DecisionLog()

    def __call__(
        self, contexts: Mapping[DeploymentID, AutoscalingContext]
    ) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
        """The target of each deployment; what it was, where anything goes wrong."""
        try:
            targets = self._decide(time.monotonic(), list(contexts.values()))
        except Exception:
            logger.exception("autoscaling failed; nothing changes")
            self._decided_at = time.monotonic() + 10 * DECIDE_S
            targets = {}
        given = {id: targets.get(id, c.target_num_replicas) for id, c in contexts.items()}
        return given, {}

    def _decide(
        self, now: float, contexts: Iterable[AutoscalingContext]
    ) -> dict[DeploymentID, int]:
        if now - self._decided_at < DECIDE_S:
            return {}
        self._decided_at = now
        parts = [_Part.of(context) for context in contexts]
        specs = {part.pool: part.settings.spec for part in parts}
        made_of = specs, parts[0].settings.budget
        if self._autoscaler is None or made_of != self._made_of:
            self._autoscaler, self._made_of = Autoscaler(*made_of), made_of
        fresh = self._hearing.fresh
        heard = {part.pool: list(fresh(now, part.context).values()) for part in parts}
        signals = _signals(parts, heard)
        decisions = self._autoscaler.decide(now, signals)
        for part in parts:
            self._tell(part, signals[part.pool].target, decisions[part.pool])
            self._follow_start(part, heard[part.pool], decisions[part.pool].target)
        self._metrics.export()
        return {part.context.deployment_id: decisions[part.pool].target for part in parts}

    def _follow_start(self, part: _Part, heard: Heard, target: int) -> None:
        told = [Start(v[CREATED], v[STARTUP]) for _, v in heard if CREATED in v and STARTUP in v]
        watch = self._starts.setdefault(part.pool, StartWatch())
        running = part.context.current_num_replicas
        for phase, took_s in (watch.follow(time.time(), target, running, told) or {}).items():
            name = part.pool or "router"
            self._registry.gauge(table.STARTUP_SECONDS, name, phase).value = took_s

    def _tell(self, part: _Part, before: int, decision: Decision) -> None:
        name = part.pool or "router"
        self._registry.gauge(table.TARGET_REPLICAS, name).value = float(decision.target)
        self._registry.gauge(table.WANTED_REPLICAS, name).value = float(decision.wanted)
        changes = []
        if decision.target != before:
            self._registry.counter(table.SCALING_DECISIONS, name, decision.cause).add()
            message = "autoscaling: %s from %d to %d replicas (%s): %s"
            change = before, decision.target
            why = decision.cause, decision.reason
            logger.info(message, name, *change, *why)
            changes = [TargetChange(time.time(), name, *change, *why)]
        self._log.note(part.context.deployment_id, changes)


class PoolPolicy:
    """Decides for one deployment by what its own replicas say.

    It stands in where the application has no ``autoscaling_policy``; then there is no forecast.
    """

    def __init__(self, **_settings: Any) -> None:
        self._policy = ApplicationPolicy()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The target of the deployment."""
        given, _ = self._policy({context.deployment_id: context})
        return given[context.deployment_id], {}


def _signals(parts: list[_Part], heard: Mapping[str, Heard]) -> dict[str, PoolSignals]:
    routers = [part for part in parts if part.settings.spec.is_router]
    told = [(age, parse_reports(v)) for part in routers for age, v in heard[part.pool]]
    by_router = [reports for _, reports in told if reports]
    age_s = min((age for age, reports in told if reports), default=None)
    signals = {}
    for part in parts:
        if age_s is None:
            signals[part.pool] = _by_replicas(part, heard[part.pool])
            continue
        reports = [r[part.pool] for r in by_router if part.pool in r]
        base = _base(part, heard[part.pool], age_s)
        signals[part.pool] = merge(reports, part.settings.limits, base)
    return signals


def _by_replicas(part: _Part, heard: Heard) -> PoolSignals:
    """What replicas say alone, where no router does: the requests that they have."""
    known = [values[ONGOING] for _, values in heard if ONGOING in values]
    base = _base(part, heard, 0.0 if known else float("inf"))
    return merge([LoadReport(ongoing=value) for value in known], {}, base)


def _base(part: _Part, heard: Heard, age_s: float) -> PoolSignals:
    startups = [values[STARTUP] for _, values in heard if values.get(STARTUP)]
    return PoolSignals(
        target=part.context.target_num_replicas,
        running=part.context.current_num_replicas,
        age_s=age_s,
        startup_s=max(startups, default=None),
    )
