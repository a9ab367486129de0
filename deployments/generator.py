"""A generator replica: one language-model engine (vLLM or the simulated one) behind a link."""

from cluster.config import GeneratorConfig
from cluster.engines.factory import make_generator_engine
from deployments.replica import EngineReplica


class Generator(EngineReplica):
    """One replica of a generator pool."""

    async def __init__(self, config: GeneratorConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._start(config.name, make_generator_engine(config, ray_metrics=True))
