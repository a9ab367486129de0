"""Decisions of a rollout: a function of its state, its rule and what was observed.

The share of the new version only grows, or ends at 0 by a rollback; both ends are final. So a
rollout cannot oscillate, and a decider that restarts goes on from the stored state.
"""

import math
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.config import RolloutConfig
from cluster.rollout.figures import Totals
from cluster.rollout.judge import Verdict, judge
from cluster.rollout.state import Action, RolloutState

_NOTHING = Totals()


@dataclass(frozen=True, slots=True)
class Observation:
    """State of the cluster at one moment."""

    now: float
    """Unix time."""
    totals: Totals = _NOTHING
    """Sums over all routers since the rollout began."""
    ready: int = 0
    """Replicas of the new version that run and passed the readiness check."""
    failure: str = ""
    """Reason for which the new version cannot serve at all."""
    action: Action | None = None
    """Request of an operator."""


def plan(replicas: int, room: int, share: float) -> tuple[int, int | None]:
    """Return the replicas of the new version for a share, and the limit of the old version's.

    Args:
        replicas: Replicas of the old version at the start.
        room: Replicas of the new version that fit beside them.
        share: Percentage of the sessions that the new version gets.
    """
    replicas = max(1, replicas)
    # The old version keeps a replica until it has no sessions, unless the only one must give way.
    most = replicas - (room == 0)
    new = max(1, min(math.ceil(replicas * share / 100), most))
    return new, (None if new <= room else replicas + room - new)


def decide(state: RolloutState, kind: str, rule: RolloutConfig, seen: Observation) -> RolloutState:
    """Return the next state of a rollout; the same state if nothing changes.

    Args:
        state: The present state.
        kind: See ``judge``.
        rule: Steps and limits.
        seen: The observation.
    """
    if state.is_finished:
        return state
    if seen.action == "abort":
        return _roll_back(state, seen.now, "aborted by an operator")
    if seen.failure:
        return _roll_back(state, seen.now, seen.failure)
    if seen.action is not None and state.is_paused != (seen.action == "pause"):
        return _set_paused(state, seen, "requested by an operator")
    state = replace(state, window=seen.totals - state.base)
    if state.is_paused:
        return state
    if state.phase == "starting":
        return _start(state, rule, seen)
    if state.phase == "canary" and state.share < rule.canary[state.step]:
        return _await_replicas(state, rule, seen)
    return _compare(state, kind, rule, seen)


def _start(state: RolloutState, rule: RolloutConfig, seen: Observation) -> RolloutState:
    if not state.new_replicas:
        if not _must_replace(state):
            return _scale(state, rule.canary[0])
        if rule.shadow:
            reason = "no room for the shadow: the only replica would have to stop first"
            return _roll_back(state, seen.now, reason)
        # Requests wait for the new version, since the old one will have no replica.
        return _scale(replace(state, share=100.0), 100.0)
    if seen.ready >= state.new_replicas:
        if _must_replace(state):
            state = replace(state, phase="canary", step=len(rule.canary) - 1)
            text = f"100 %; {seen.ready} replicas are ready"
            return _restart_window(state, seen).note(seen.now, "share", text)
        if rule.shadow:
            state = replace(state, phase="shadow", is_shadowed=True)
            return _restart_window(state, seen).note(seen.now, "shadow", "the replicas are ready")
        return _await_replicas(replace(state, phase="canary"), rule, seen)
    if seen.now - state.since > rule.start_timeout_s:
        reason = f"{seen.ready} of {state.new_replicas} replicas ready after the start timeout"
        return _roll_back(state, seen.now, reason)
    return state


def _await_replicas(state: RolloutState, rule: RolloutConfig, seen: Observation) -> RolloutState:
    """Give the new version the step's share once it has the replicas for it."""
    if seen.ready < state.new_replicas:
        return _pause_if_late(state, rule, seen, f"{seen.ready} of {state.new_replicas} replicas")
    share = rule.canary[state.step]
    state = _restart_window(replace(state, share=share), seen)
    return state.note(seen.now, "share", f"{share:g} %; {seen.ready} replicas are ready")


def _compare(
    state: RolloutState, kind: str, rule: RolloutConfig, seen: Observation
) -> RolloutState:
    window = state.window
    # In the last step the old version gets no requests: compare with its earlier ones.
    old = window.old if window.old.finished >= rule.min_requests else seen.totals.old
    # Copies, whose labels are compared, end with the requests to the old version.
    labels = seen.totals.new
    new = replace(window.new, compared=labels.compared, agreed=labels.agreed)
    verdict = judge(kind, rule, old, new)
    if verdict.outcome == "worse":
        return _roll_back(state, seen.now, verdict.reason)
    if verdict.outcome == "unknown" or seen.now - state.since < rule.step_s:
        return _pause_if_late(state, rule, seen, verdict.reason)
    if verdict.outcome == "uncompared" and not state.is_approved:
        return _ask_operator(state, rule, seen, verdict.reason)
    return _advance(state, rule, seen, verdict)


def _advance(
    state: RolloutState, rule: RolloutConfig, seen: Observation, verdict: Verdict
) -> RolloutState:
    if state.phase == "shadow":
        state = replace(state, phase="canary", step=0, is_shadowed=False, since=seen.now)
        return state.note(seen.now, "canary", verdict.reason)
    if state.step + 1 == len(rule.canary):
        return replace(state, phase="promoted").note(seen.now, "promoted", verdict.reason)
    step = state.step + 1
    state = _scale(replace(state, step=step, since=seen.now), rule.canary[step])
    return state.note(seen.now, "step", verdict.reason)


def _scale(state: RolloutState, share: float) -> RolloutState:
    new, old = plan(state.replicas, state.room, share)
    return replace(state, new_replicas=new, old_replicas=old)


def _must_replace(state: RolloutState) -> bool:
    """Return True if the only replica of the old version must stop before the new one starts."""
    return state.replicas <= 1 and state.room == 0


def _restart_window(state: RolloutState, seen: Observation) -> RolloutState:
    return replace(state, since=seen.now, base=seen.totals, window=Totals())


def _pause_if_late(
    state: RolloutState, rule: RolloutConfig, seen: Observation, reason: str
) -> RolloutState:
    if seen.now - state.since <= rule.step_timeout_s:
        return state
    return _set_paused(state, seen, f"no decision after {rule.step_timeout_s:g} s: {reason}")


def _ask_operator(
    state: RolloutState, rule: RolloutConfig, seen: Observation, reason: str
) -> RolloutState:
    """Pause if the missing figures will not come; a resumption goes on without them."""
    is_late = seen.now - state.since > rule.step_timeout_s
    if state.share < 100 and not is_late:  # the old version still answers
        return state
    text = f"not compared: {reason}; resume to go on without, or abort"
    return _set_paused(replace(state, needs_approval=True), seen, text)


def _set_paused(state: RolloutState, seen: Observation, reason: str) -> RolloutState:
    is_paused = not state.is_paused
    if not is_paused and state.needs_approval:
        state = replace(state, needs_approval=False, is_approved=True)
    elif not is_paused:  # the time of the pause does not count
        state = _restart_window(state, seen)
    state = replace(state, is_paused=is_paused)
    return state.note(seen.now, "paused" if is_paused else "resumed", reason)


def _roll_back(state: RolloutState, now: float, reason: str) -> RolloutState:
    state = replace(
        state, phase="rolled_back", share=0.0, is_shadowed=False, old_replicas=None, new_replicas=0
    )
    return state.note(now, "rolled_back", reason)
