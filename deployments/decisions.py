"""What autoscaling decided last: from the policy in Serve's controller to the routers' dashboard.

The policy writes each deployment's last changes below one key of the cluster's GCS when there is
one; a router reads the keys while somebody looks. Where no policy ran there is no key. That the GCS
does not answer costs nobody anything but this.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve._private.common import DeploymentID

from cluster.autoscaling import TargetChange

logger = logging.getLogger("ray.serve.tandem")

KEPT = 20
"""Changes of each deployment."""
TIMEOUT_S = 1.0
"""Serve's controller waits as long at most, when a target changes."""
_NAMESPACE = b"tandem"

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[TargetChange]).decode


class DecisionLog:
    """The last changes of each deployment; goes on where the controller before ended."""

    def __init__(self) -> None:
        self._changes: dict[DeploymentID, deque[TargetChange]] = {}

    def note(self, deployment: DeploymentID, changes: Sequence[TargetChange]) -> None:
        """Keep what was decided now, which may be nothing; a change blocks for a round trip."""
        kept = self._changes.get(deployment)
        if kept is None:
            kept = self._changes[deployment] = deque(_read([deployment]) or (), maxlen=KEPT)
        elif not changes:
            return
        kept.extend(changes)
        try:
            _put(_key(deployment), _encode(list(kept)))
        except RayError as error:  # the next change brings these along
            logger.warning("what autoscaling decided could not be written down: %s", error)


async def read_decisions(deployments: Sequence[DeploymentID]) -> list[TargetChange] | None:
    """The last changes of all ``deployments``; None where no policy is known to have run."""
    return await asyncio.to_thread(_read, deployments)


def _read(deployments: Iterable[DeploymentID]) -> list[TargetChange] | None:
    try:
        found = [_decode(one) for one in _get([_key(deployment) for deployment in deployments])]
    except (RayError, msgspec.DecodeError) as error:  # no answer, or of another version
        logger.warning("what autoscaling decided could not be read: %s", error)
        return None
    return [change for changes in found for change in changes] if found else None


def _key(deployment: DeploymentID) -> bytes:
    return f"decisions:{deployment.app_name}:{deployment.name}".encode()


def _put(key: bytes, value: bytes) -> None:
    gcs = internal_kv.internal_kv_get_gcs_client()
    gcs.internal_kv_put(key, value, True, namespace=_NAMESPACE, timeout=TIMEOUT_S)


def _get(keys: list[bytes]) -> list[bytes]:
    gcs = internal_kv.internal_kv_get_gcs_client()
    found = gcs.internal_kv_multi_get(keys, namespace=_NAMESPACE, timeout=TIMEOUT_S)
    return list(found.values())
