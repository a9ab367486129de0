"""The autoscaling policy of a Tandem application, called by Ray Serve's controller.

Keeps the state that ``cluster.autoscaling`` learns between the calls. The policy must never raise:
an exception would stop the controller's loop for all applications. It must not import torch or
vLLM. The settings of each deployment arrive in its ``policy_kwargs``.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.config import AutoscalingContext

from cluster import ray_internals, serve_internals
from cluster.autoscaling import Autoscaler, Decision, PoolSignals, TargetChange
from cluster.autoscaling.pool import NO_GAIN, STALE_S
from cluster.autoscaling.reports import LoadReport, merge_reports, parse_reports
from cluster.autoscaling.settings import PoolSettings
from cluster.autoscaling.starts import ReplicaStart, StartTracker
from cluster.metrics import Registry, table
from cluster.rollout import RolloutState
from cluster.serve_internals import DeploymentID
from deployments.decisions import DecisionLog
from deployments.metrics import RayMetrics
from deployments.rollout_store import read_state

logger = logging.getLogger("ray.serve.tandem")

IN_FLIGHT = "in_flight"
"""Key of a replica's report: its requests in flight."""
CREATED_AT = "created_at"
"""Key of a replica's report: Unix time at which its process was created."""
STARTUP_S = "startup_s"
"""Key of a replica's report: seconds from then until it could serve."""
CORE_SHARE = "core_share"
"""Key of a replica's report: share of its node's cores that its compute threads use; 0 on
GPUs."""
DECISION_INTERVAL_S = 2.0
"""Seconds between decisions, as between reports; the controller calls more often."""
STEADY_INTERVAL_S = 1.0
"""Pause of the controller's loop while all deployments have the replicas they should have."""
CHANGING_INTERVAL_S = 0.25
"""The same while replicas start or stop, and before the first call of the policy. Clusters of
``tandem up`` and the image start Serve with it; with another interval, the pause never changes."""
NODES_TIMEOUT_S = 1.0
"""Maximum time for which reading the cluster's nodes blocks Serve's controller."""
_NO_CAPACITY = ("cores", NO_GAIN)
"""Causes of decisions that add no replica because it would add no capacity."""
_PAUSE_AFTER_ERROR_S = 10 * DECISION_INTERVAL_S

ReplicaReports = list[tuple[float, dict[str, float]]]
"""Last report of each replica of a deployment, with its age in seconds."""


@dataclass(frozen=True, slots=True)
class _Deployment:
    """One deployment in one call of the policy."""

    context: AutoscalingContext
    settings: PoolSettings

    @classmethod
    def from_context(cls, context: AutoscalingContext) -> "_Deployment":
        settings = PoolSettings.decode(context.config.policy.policy_kwargs)
        least, most = (
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        if settings.rollout:  # Serve's own lower limit is 0
            least = min(settings.spec.min, most)
        return cls(context, replace(settings, spec=replace(settings.spec, min=least, max=most)))

    def limit(self, rollout: RolloutState | None) -> "_Deployment":
        """Return the deployment with the limits of a rollout of its pool."""
        spec, settings = self.settings.spec, self.settings
        if settings.is_candidate:
            least = rollout.new_replicas if rollout is not None else 0
            spec = replace(spec, min=least, max=max(least, spec.max) if least else 0)
        elif rollout is not None and rollout.old_replicas is not None:
            most = rollout.old_replicas
            spec = replace(spec, min=min(spec.min, most), max=min(spec.max, most))
        return replace(self, settings=replace(settings, spec=spec))

    @property
    def pool(self) -> str:
        """Name of the pool; "" for the router."""
        return self.settings.pool

    @property
    def label(self) -> str:
        return self.pool or "router"


class ReportClock:
    """Ages of the replicas' reports, measured by this process' clock.

    A report's own timestamp only tells whether it is new, because other nodes' clocks may be off.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[float, float]] = {}  # timestamp, and when it was first seen

    def fresh_reports(self, now: float, context: AutoscalingContext) -> ReplicaReports:
        """Return the last report of each replica that is at most ``STALE_S`` old."""
        values: dict[Any, dict[str, float]] = {}
        timestamps: dict[Any, float] = {}
        for name, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if series:
                    values.setdefault(replica, {})[name] = series[-1].value
                    timestamps[replica] = max(timestamps.get(replica, 0.0), series[-1].timestamp)
        for replica, timestamp in timestamps.items():
            if self._seen.get(replica, (None,))[0] != timestamp:
                self._seen[replica] = timestamp, now
        # Serve keeps the last report of a silent replica. Forgetting it here would make it new.
        self._seen = {
            replica: seen
            for replica, seen in self._seen.items()
            if replica in timestamps or now - seen[1] < 10 * STALE_S
        }
        ages = {replica: now - self._seen[replica][1] for replica in timestamps}
        return [(age, values[replica]) for replica, age in ages.items() if age <= STALE_S]


class ApplicationPolicy:
    """The ``autoscaling_policy`` of an application: decides for all its deployments at once."""

    def __init__(self) -> None:
        serve_internals.keep_updating_replicas()
        ray_internals.signal_rest()()
        self._autoscaler: Autoscaler | None = None
        self._autoscaler_settings: Any = None
        self._next_decision_at = 0.0
        self._clock = ReportClock()
        self._starts: dict[str, StartTracker] = {}
        self._registry = Registry()
        self._metrics = RayMetrics(self._registry)
        self._log = DecisionLog()
        # Last known values by pool; missing until the first report and the first count.
        self._core_shares: dict[str, float] = {}
        self._num_nodes: dict[str, int] = {}
        # Last recorded target and cause by pool, if more replicas would add no capacity.
        self._limited: dict[str, tuple[int, str] | None] = {}
        self._rollouts: dict[str, RolloutState | None] = {}

    def __call__(
        self, contexts: Mapping[DeploymentID, AutoscalingContext]
    ) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
        """Return the target of each deployment; the present targets if anything fails."""
        targets: dict[DeploymentID, int] = {}
        now = time.monotonic()
        if now >= self._next_decision_at:
            self._next_decision_at = now + DECISION_INTERVAL_S
            try:
                deployments = [_Deployment.from_context(c) for c in contexts.values()]
                targets = self._decide(now, [self._limit_rollout(d) for d in deployments])
            except Exception:
                logger.exception("autoscaling failed; the targets stay as they are")
                self._next_decision_at = now + _PAUSE_AFTER_ERROR_S
        targets = {id: targets.get(id, c.target_num_replicas) for id, c in contexts.items()}
        is_steady = all(c.current_num_replicas == targets[id] for id, c in contexts.items())
        self._set_control_interval(STEADY_INTERVAL_S if is_steady else CHANGING_INTERVAL_S)
        return targets, {}

    def _set_control_interval(self, wanted_s: float) -> None:
        # Otherwise Tandem did not start the cluster, or the user has set the interval.
        if serve_internals.configured_control_interval() == CHANGING_INTERVAL_S:
            serve_internals.set_control_interval(self, wanted_s)

    def _limit_rollout(self, deployment: _Deployment) -> _Deployment:
        settings, name = deployment.settings, deployment.pool.partition("@")[0]
        if not settings.rollout:
            return deployment
        try:
            state = read_state(deployment.context.deployment_id.app_name, name)
        except RayError as error:  # the last limits stay
            logger.warning("could not read the rollout of %s: %s", name, error)
        else:
            deployed = settings.rollout, settings.rollout_model
            is_deployed = state is not None and (state.version, state.model) == deployed
            self._rollouts[name] = state if is_deployed else None
        return deployment.limit(self._rollouts.get(name))

    def _decide(self, now: float, deployments: list[_Deployment]) -> dict[DeploymentID, int]:
        reports = {d.pool: self._clock.fresh_reports(now, d.context) for d in deployments}
        signals = _signals(deployments, reports)
        for deployment in deployments:
            if deployment.settings.spec.fills_nodes:
                pool = deployment.pool
                limit = self._core_limit(deployment, reports[pool])
                signals[pool] = replace(signals[pool], core_limit=limit)
        decisions = self._current_autoscaler(deployments).decide(now, signals)
        for deployment in deployments:
            decision = decisions[deployment.pool]
            self._record(deployment, signals[deployment.pool].target, decision)
            self._follow_start(deployment, reports[deployment.pool], decision.target)
        self._metrics.export()
        return {d.context.deployment_id: decisions[d.pool].target for d in deployments}

    def _core_limit(self, deployment: _Deployment, reports: ReplicaReports) -> int | None:
        """Return the replicas that the nodes have cores for; None if cores are no limit.

        While that is unknown, it is the present target, but at least one.
        """
        pool = deployment.pool
        unknown: int = max(1, deployment.context.target_num_replicas)
        shares = [values[CORE_SHARE] for _, values in reports if CORE_SHARE in values]
        if shares:
            self._core_shares[pool] = max(shares)
        share = self._core_shares.get(pool)
        if share is None:
            return unknown
        if not share:
            return None
        try:
            self._num_nodes[pool] = ray_internals.count_cpu_nodes(
                deployment.settings.spec.cpus, NODES_TIMEOUT_S
            )
        except RayError as error:
            known = self._num_nodes.get(pool, "an unknown number")
            logger.warning("could not count the nodes, assuming %s: %s", known, error)
        if pool not in self._num_nodes:
            return unknown
        # At least one: a pending replica makes a node autoscaler add the first node.
        return max(1, self._num_nodes[pool] * max(1, int(1 / share + 1e-9)))

    def _current_autoscaler(self, deployments: list[_Deployment]) -> Autoscaler:
        specs = {d.pool: d.settings.spec for d in deployments}
        settings = specs, deployments[0].settings.budget
        if self._autoscaler is None or settings != self._autoscaler_settings:
            self._autoscaler, self._autoscaler_settings = Autoscaler(*settings), settings
        return self._autoscaler

    def _follow_start(self, deployment: _Deployment, reports: ReplicaReports, target: int) -> None:
        starts = [
            ReplicaStart(values[CREATED_AT], values[STARTUP_S])
            for _, values in reports
            if CREATED_AT in values and STARTUP_S in values
        ]
        watch = self._starts.setdefault(deployment.pool, StartTracker())
        running = deployment.context.current_num_replicas
        phases = watch.follow(time.time(), target, running, starts) or {}
        for phase, duration_s in phases.items():
            gauge = self._registry.gauge(table.STARTUP_SECONDS, deployment.label, phase)
            gauge.value = duration_s

    def _record(self, deployment: _Deployment, before: int, decision: Decision) -> None:
        """Export a decision; log and store each change, and when more replicas stop helping."""
        label = deployment.label
        self._registry.gauge(table.TARGET_REPLICAS, label).value = float(decision.target)
        self._registry.gauge(table.WANTED_REPLICAS, label).value = float(decision.wanted)
        changes = []
        limited = (decision.target, decision.cause) if decision.cause in _NO_CAPACITY else None
        has_changed = decision.target != before
        if has_changed:
            self._registry.counter(table.SCALING_DECISIONS, label, decision.cause).add()
        first_limited = limited is not None and self._limited.get(label) != limited
        self._limited[label] = limited
        if has_changed or first_limited:
            message = "autoscaling: %s from %d to %d replicas (%s): %s"
            change = label, before, decision.target, decision.cause, decision.reason
            logger.info(message, *change)
            changes = [TargetChange(time.time(), *change)]
        self._log.record(deployment.context.deployment_id, changes)


class PoolPolicy:
    """The policy of a single deployment, for applications without an ``autoscaling_policy``.

    It knows only the reports of the deployment's own replicas, so it has no forecast.
    """

    def __init__(self, **_settings: Any) -> None:
        self._policy = ApplicationPolicy()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        targets, _ = self._policy({context.deployment_id: context})
        return targets[context.deployment_id], {}


def _signals(
    deployments: list[_Deployment], reports: Mapping[str, ReplicaReports]
) -> dict[str, PoolSignals]:
    """Return the signals of each pool, from the routers' reports if there are any."""
    from_routers = [
        (age_s, by_pool)
        for deployment in deployments
        if deployment.settings.spec.is_router
        for age_s, values in reports[deployment.pool]
        if (by_pool := parse_reports(values))
    ]
    if not from_routers:
        return {d.pool: _signals_of_replicas(d, reports[d.pool]) for d in deployments}
    age_s = min(age for age, _ in from_routers)
    signals = {}
    for deployment in deployments:
        pool = deployment.pool
        of_pool = [by_pool[pool] for _, by_pool in from_routers if pool in by_pool]
        base = _base_signals(deployment, reports[pool], age_s)
        signals[pool] = merge_reports(of_pool, deployment.settings.limits, base)
    return signals


def _signals_of_replicas(deployment: _Deployment, reports: ReplicaReports) -> PoolSignals:
    in_flight = [values[IN_FLIGHT] for _, values in reports if IN_FLIGHT in values]
    base = _base_signals(deployment, reports, 0.0 if in_flight else float("inf"))
    return merge_reports([LoadReport(in_flight=value) for value in in_flight], {}, base)


def _base_signals(deployment: _Deployment, reports: ReplicaReports, age_s: float) -> PoolSignals:
    startups = [values[STARTUP_S] for _, values in reports if values.get(STARTUP_S)]
    return PoolSignals(
        target=deployment.context.target_num_replicas,
        running=deployment.context.current_num_replicas,
        age_s=age_s,
        startup_s=max(startups, default=None),
    )
