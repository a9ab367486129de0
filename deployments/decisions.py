"""Recent autoscaling decisions: from the policy in Serve's controller to the routers' dashboard.

The policy stores the last changes of each deployment under one key in the cluster's GCS; a router
reads the keys while a dashboard is open. If the GCS is down, only this panel is affected.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
from ray.exceptions import RayError

from cluster import ray_internals
from cluster.autoscaling import TargetChange
from cluster.serve_internals import DeploymentID

logger = logging.getLogger("ray.serve.tandem")

MAX_CHANGES = 20
"""Stored changes of each deployment."""
TIMEOUT_S = 1.0
"""Maximum time for which a change of a target blocks Serve's controller."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[TargetChange]).decode


class DecisionLog:
    """Last changes of each deployment, including those that an earlier controller stored."""

    def __init__(self) -> None:
        self._changes: dict[DeploymentID, deque[TargetChange]] = {}

    def record(self, deployment: DeploymentID, changes: Sequence[TargetChange]) -> None:
        """Store the changes of one decision, possibly none; blocks for a round trip if any."""
        stored = self._changes.get(deployment)
        if stored is None:
            stored = deque(_read([deployment]) or (), maxlen=MAX_CHANGES)
            self._changes[deployment] = stored
        elif not changes:
            return
        stored.extend(changes)
        try:
            ray_internals.kv_put(_key(deployment), _encode(list(stored)), TIMEOUT_S)
        except RayError as error:  # the next change stores these too
            logger.warning("could not store autoscaling decisions: %s", error)


async def read_decisions(deployments: Sequence[DeploymentID]) -> list[TargetChange] | None:
    """Return the last changes of all deployments; None if no policy has run."""
    return await asyncio.to_thread(_read, deployments)


def _read(deployments: Iterable[DeploymentID]) -> list[TargetChange] | None:
    keys = [_key(deployment) for deployment in deployments]
    try:
        found = [_decode(value) for value in ray_internals.kv_get_many(keys, TIMEOUT_S)]
    except (RayError, msgspec.DecodeError) as error:  # no answer, or written by another version
        logger.warning("could not read autoscaling decisions: %s", error)
        return None
    return [change for changes in found for change in changes] if found else None


def _key(deployment: DeploymentID) -> bytes:
    return f"decisions:{deployment.app_name}:{deployment.name}".encode()
