"""An application whose replica names an address at which no link can be opened."""

from typing import Any

from ray.serve import Application

import deployments.app
from deployments.generator import Generator


class Unlinkable(Generator):
    def record_replica_metadata(self) -> dict[str, Any]:
        return {**super().record_replica_metadata(), "port": 1}


def build(args: dict[str, Any]) -> Application:
    deployments.app.Generator = Unlinkable  # type: ignore[misc]
    return deployments.app.build(args)
