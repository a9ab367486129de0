"""Classifier engine: the ``Engine`` protocol around service, cache and HTTP app."""

from cluster.asgi import ASGIApp
from cluster.config import ClassifierConfig
from cluster.engines.classifier.serving.app import ClassifierApp
from cluster.engines.classifier.serving.cache import CachingService
from cluster.engines.classifier.serving.drift import DriftSnapshot
from cluster.engines.classifier.serving.insight import Insight
from cluster.engines.classifier.serving.metrics import ClassifierCounts, write_counts, write_drift
from cluster.engines.classifier.serving.routes import routes
from cluster.engines.classifier.serving.service import ClassifierService
from cluster.engines.startup import StartupTimer
from cluster.errors import UnavailableError
from cluster.link import Adapters
from cluster.load import Load
from cluster.metrics import Registry


class ClassifierEngine:
    """Engine of one BERT-like model; see ``cluster.engines.base.Engine``.

    Args:
        config: The pool.
        model_path: Directory of a transformers model with safetensors and a fast tokenizer.
    """

    prefixes: None = None  # whole results are cached, not prefixes
    resume_key = ""  # answers are not streamed
    adapters = Adapters()
    workers = ()  # it computes in this process
    on_demand_bytes = 0
    context_tokens: None = None  # longer texts are truncated or split

    def __init__(self, config: ClassifierConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._service: ClassifierService | None = None
        self._caching: CachingService | None = None
        self._insight: Insight | None = None
        self._app: ClassifierApp | None = None
        self.start_phases_s: dict[str, float] = {}

    @property
    def app(self) -> ASGIApp:
        if self._app is None:
            raise UnavailableError("the engine is not started")
        return self._app

    @property
    def service(self) -> ClassifierService:
        """The model without HTTP, valid between ``start`` and ``stop``."""
        if self._service is None:
            raise UnavailableError("the engine is not started")
        return self._service

    async def start(self) -> None:
        timer = StartupTimer()
        self._service = await ClassifierService.start(self._config, self._model_path)
        timer.mark("model")
        self.start_phases_s = timer.phases_s
        self._caching = CachingService(self._service, self._config.result_cache)
        self._insight = Insight.for_model(self._config, self._model_path, self._service.model)
        self._app = ClassifierApp(self._config, self._caching, self._insight)

    async def reconfigure(self, pool: ClassifierConfig) -> None:
        self._config = pool
        self.service.reconfigure(pool)
        if self._app is not None:
            self._app.reconfigure(pool)

    async def check_health(self) -> None:
        self.service.check_health()

    def load(self) -> Load:
        """Return the load: running requests have a text in a current batch, the others wait."""
        return self._service.load() if self._service else Load()

    def counts(self) -> ClassifierCounts:
        counts = self.service.counts()
        if self._caching and (cache := self._caching.cache):
            counts.cache_hits, counts.cache_misses = cache.hits, cache.misses
        return counts

    def drift(self) -> DriftSnapshot | None:
        """Return statistics of the classified texts; None if the model does not classify."""
        return self._insight.drift() if self._insight else None

    def observe(self, registry: Registry) -> None:
        write_counts(registry, self._config.name, self.counts())
        if (snapshot := self.drift()) is not None:
            write_drift(registry, self._config.name, snapshot)

    def routes(self) -> tuple[str, ...]:
        return routes(self._config)

    async def stop(self) -> None:
        if self._insight is not None:
            await self._insight.stop()
        if self._service is not None:
            await self._service.stop()
