"""The encoder engine as a replica sees it: the ``Engine`` protocol around the service."""

from dataclasses import replace

from cluster.asgi import ASGIApp
from cluster.config import ClassifierConfig
from cluster.engines.classifier.serving.app import ClassifierApp
from cluster.engines.classifier.serving.cache import CachingService
from cluster.engines.classifier.serving.drift import DriftSnapshot
from cluster.engines.classifier.serving.insight import Insight
from cluster.engines.classifier.serving.metrics import write_counts, write_drift
from cluster.engines.classifier.serving.service import ClassifierCounts, ClassifierService
from cluster.engines.classifier.serving.tasks import routes
from cluster.engines.startup import StartupTimer
from cluster.errors import UnavailableError
from cluster.load import Load
from cluster.metrics import Registry


class ClassifierEngine:
    """One encoder that classifies, embeds, or both; see ``cluster.engines.base.Engine``.

    Args:
        config: The pool it belongs to.
        model_path: A model directory of transformers with safetensors and a fast tokenizer.
    """

    def __init__(self, config: ClassifierConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._service: ClassifierService | None = None
        self._caching: CachingService | None = None
        self._insight: Insight | None = None
        self._app: ASGIApp | None = None
        self.start_phases_s: dict[str, float] = {}

    @property
    def app(self) -> ASGIApp:
        """The ASGI application; valid between ``start`` and ``stop``."""
        if self._app is None:
            raise UnavailableError("the engine is not started")
        return self._app

    @property
    def service(self) -> ClassifierService:
        """The same model without HTTP; valid between ``start`` and ``stop``."""
        if self._service is None:
            raise UnavailableError("the engine is not started")
        return self._service

    async def start(self) -> None:
        """Load the model; see ``Engine.start``."""
        timer = StartupTimer()
        self._service = await ClassifierService.start(self._config, self._model_path)
        timer.mark("model")
        self.start_phases_s = timer.phases_s
        self._caching = CachingService(self._service, self._config.result_cache)
        self._insight = Insight.of(self._config, self._model_path, self._service.model)
        self._app = ClassifierApp(self._config, self._caching, self._insight)

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the model thread failed."""
        self.service.check_health()

    def load(self) -> Load:
        """Running: requests with a text in the current batch. Waiting: all other admitted ones."""
        return self._service.load() if self._service else Load()

    def counts(self) -> ClassifierCounts:
        """What the engine did since its start, for metrics."""
        counts = self.service.counts()
        cache = self._caching and self._caching.cache
        if not cache:
            return counts
        return replace(counts, cache_hits=cache.hits, cache_misses=cache.misses)

    def drift(self) -> DriftSnapshot | None:
        """What the classified texts looked like, for metrics; None where nothing is classified."""
        return self._insight.drift() if self._insight else None

    @property
    def prefixes(self) -> None:
        """Nothing: whole results are kept, not prefixes."""
        return None

    def observe(self, registry: Registry) -> None:
        """Write the counters into the registry."""
        write_counts(registry, self._config.name, self.counts())
        if (seen := self.drift()) is not None:
            write_drift(registry, self._config.name, seen)

    def routes(self) -> tuple[str, ...]:
        """The paths of the configured tasks."""
        return routes(self._config)

    async def stop(self) -> None:
        """Fail what is open with ``UnavailableError`` and end the threads; safe to call twice."""
        if self._insight is not None:
            await self._insight.stop()
        if self._service is not None:
            await self._service.stop()
