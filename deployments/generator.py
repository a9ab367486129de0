"""A generator replica: one language-model engine (vLLM or the simulated one) behind a link."""

from functools import partial

from cluster.config import GeneratorConfig
from cluster.config.operations import OperationsConfig
from cluster.engines.factory import make_generator_engine
from deployments.replica import EngineReplica


class Generator(EngineReplica):
    """One replica of a generator pool."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: GeneratorConfig, operations: OperationsConfig
    ) -> None:
        tracing = operations.tracing
        endpoint = tracing.endpoint if tracing is not None else None
        make = partial(make_generator_engine, config, ray_metrics=True, traces_endpoint=endpoint)
        await self._start(make, config, operations)
