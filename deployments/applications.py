"""The applications' deployment: typed tasks and knowledge bases, which call the models."""

from ray import serve

from cluster.applications.engine import TaskEngine
from cluster.client.session import Session
from cluster.config import ApplicationsConfig
from cluster.config.operations import OperationsConfig
from cluster.models.store import home
from deployments.replica import EngineReplica


class Applications(EngineReplica):
    """Replica of the applications."""

    _pool_type = ApplicationsConfig

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ApplicationsConfig, operations: OperationsConfig
    ) -> None:
        app = serve.get_replica_context().replica_id.deployment_id.app_name
        # The client's own limit is none: the request's deadline cancels its calls.
        session = Session(app, "auto")
        directory = home() / f"knowledge-{app}"
        await self._start(lambda: TaskEngine(config, session, directory), config, operations)
