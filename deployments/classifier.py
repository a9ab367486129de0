"""A classifier replica: one encoder engine behind a link."""

from cluster.config import ClassifierConfig
from cluster.config.operations import OperationsConfig
from cluster.engines.classifier import make_classifier_engine
from deployments.replica import EngineReplica


class Classifier(EngineReplica):
    """One replica of a classifier pool."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClassifierConfig, operations: OperationsConfig
    ) -> None:
        await self._start(lambda: make_classifier_engine(config), config, operations)
