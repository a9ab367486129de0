"""An application whose replica publishes an address where no link can be opened."""

from typing import Any
from unittest.mock import patch

from ray.serve import Application

from deployments import app
from deployments.replica import Generator


class Unlinkable(Generator):
    def record_replica_metadata(self) -> dict[str, Any]:
        return {**super().record_replica_metadata(), "port": 1}


def build(args: dict[str, Any]) -> Application:
    with patch.object(app, "Generator", Unlinkable):  # this process may build other applications
        return app.build(args)
