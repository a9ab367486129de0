"""Rollouts in the cluster's GCS, which outlives routers, the decider and Serve's controller.

The decider writes the state, each router its totals, and a router an operator's action. All of them
block for a round trip; callers outside Serve's controller use a thread.
"""

import logging
from collections.abc import Sequence

import msgspec

from cluster import ray_internals
from cluster.rollout import Action, RolloutState, Totals

logger = logging.getLogger("ray.serve.tandem")

TIMEOUT_S = 1.0
ACTIONS: tuple[Action, ...] = ("abort", "pause", "resume")
"""All actions, the most important first."""

_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(RolloutState).decode
_decode_totals = msgspec.msgpack.Decoder(Totals).decode


def read_state(app: str, pool: str) -> RolloutState | None:
    """Return the last rollout of a pool; None if there was none. Raise a RayError on timeout."""
    return read_states(app, [pool]).get(pool)


def read_states(app: str, pools: Sequence[str]) -> dict[str, RolloutState]:
    """Return the last rollouts of the pools that had one. Raise a RayError on timeout."""
    states = {}
    for pool in pools:
        for content in ray_internals.kv_get_many([_key("state", app, pool)], TIMEOUT_S):
            try:
                states[pool] = _decode_state(content)
            except msgspec.DecodeError as error:  # written by another release
                logger.warning("ignoring the state of a rollout of %s: %s", pool, error)
    return states


def write_state(app: str, pool: str, state: RolloutState) -> None:
    """Store the state of a rollout."""
    ray_internals.kv_put(_key("state", app, pool), _encode(state), TIMEOUT_S)


def write_totals(app: str, pool: str, version: str, router: str, totals: Totals) -> None:
    """Store the totals of one router. They stay when it ends, so that no answer is lost."""
    key = _key("totals", app, pool, version, router)
    ray_internals.kv_put(key, _encode(totals), TIMEOUT_S)


def read_totals(app: str, pool: str, version: str) -> Totals:
    """Return the sums over all routers."""
    prefix = _key("totals", app, pool, version, "")
    return sum(map(_decode_totals, ray_internals.kv_get_prefix(prefix, TIMEOUT_S)), Totals())


def write_action(app: str, pool: str, version: str, action: Action) -> None:
    """Store an operator's action for the decider."""
    ray_internals.kv_put(_action_key(app, pool, version, action), action.encode(), TIMEOUT_S)


def read_action(app: str, pool: str, version: str) -> Action | None:
    """Return the most important action that waits for this rollout; it stays stored."""
    keys = [_action_key(app, pool, version, action) for action in ACTIONS]
    for content in ray_internals.kv_get_many(keys, TIMEOUT_S):
        return next(action for action in ACTIONS if action.encode() == content)
    return None


def delete_action(app: str, pool: str, version: str, action: Action) -> None:
    """Delete an action whose effect is stored."""
    ray_internals.kv_delete(_action_key(app, pool, version, action))


def delete_totals(app: str, pool: str) -> None:
    """Delete the totals of a finished rollout."""
    ray_internals.kv_delete_prefix(_key("totals", app, pool, ""))


def _action_key(app: str, pool: str, version: str, action: Action) -> bytes:
    # One key per action, so that no action replaces another one or is deleted with it.
    return _key("action", app, pool, version, action)


def _key(kind: str, *parts: str) -> bytes:
    return "|".join((f"rollout-{kind}", *parts)).encode()  # no name contains a bar
