"""A classifier replica: one encoder engine behind a link."""

from cluster.config import ClassifierConfig
from cluster.engines.encoder import make_encoder_engine
from deployments.replica import EngineReplica


class Classifier(EngineReplica):
    """One replica of a classifier pool."""

    async def __init__(self, config: ClassifierConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._start(config.name, make_encoder_engine(config))
