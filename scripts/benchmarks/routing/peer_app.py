"""Deployment whose router uses a peer's policy, only for the benchmark.

Peers' policies cannot be configured. The name of the pool selects the policy (see
``live_cluster.slug``), which gets the same fleet and prefix index as ours.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from benchmarks.routing.live_cluster import peer_policy
from cluster.config import TandemConfig
from deployments import app
from deployments.router import Router


class PeerRouter(Router):
    """Router with a peer's policy."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        with peer_policy(config.generators[0].name):
            await super().__init__(config, pools)


def build(args: dict[str, Any]) -> Application:
    """Build the usual application with this router."""
    # Undo the patch: Serve may build another application in this process.
    with patch.object(app, "Router", PeerRouter):
        return app.build(args)
