"""A deployment whose router chooses as another one does, for the benchmark alone.

Peers' policies are no setting of the product: a router of this application asks the one that its
pool is named after (``live_cluster.slug``), with the fleet and the prefixes that ours would have.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from benchmarks.routing.live_cluster import choosing_as
from cluster.config import TandemConfig
from deployments import app
from deployments.router import Router


class PeerRouter(Router):
    """A router with a peer's policy."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        with choosing_as(config.generators[0].name):
            await super().__init__(config, pools)


def build(args: dict[str, Any]) -> Application:
    """The usual application with another router."""
    # Taken back: Serve may build another application in this process.
    with patch.object(app, "Router", PeerRouter):
        return app.build(args)
