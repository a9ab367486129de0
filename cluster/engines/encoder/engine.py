"""The encoder engine as a replica sees it: the ``Engine`` protocol around the service."""

from cluster.asgi import ASGIApp
from cluster.config import ClassifierConfig
from cluster.engines.base import EngineLoad
from cluster.engines.encoder.app import ROUTES, EncoderApp
from cluster.engines.encoder.service import EncoderCounts, EncoderService
from cluster.errors import UnavailableError
from cluster.metrics import Registry, table


class EncoderEngine:
    """One encoder that classifies, embeds, or both; see ``cluster.engines.base.Engine``.

    Args:
        config: The pool it belongs to.
        model_path: A model directory of transformers with safetensors and a fast tokenizer.
    """

    def __init__(self, config: ClassifierConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._service: EncoderService | None = None
        self._app: ASGIApp | None = None

    @property
    def app(self) -> ASGIApp:
        """The ASGI application; valid between ``start`` and ``stop``."""
        if self._app is None:
            raise UnavailableError("the engine is not started")
        return self._app

    @property
    def service(self) -> EncoderService:
        """The same model without HTTP; valid between ``start`` and ``stop``."""
        if self._service is None:
            raise UnavailableError("the engine is not started")
        return self._service

    async def start(self) -> None:
        """Load the model; see ``Engine.start``."""
        self._service = await EncoderService.start(self._config, self._model_path)
        self._app = EncoderApp(self._config, self._service)

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the model thread failed."""
        self.service.check_health()

    def load(self) -> EngineLoad:
        """Running: requests with a text in the current batch. Waiting: all other admitted ones."""
        return self._service.load() if self._service else EngineLoad()

    def counts(self) -> EncoderCounts:
        """What the engine did since its start, for metrics."""
        return self.service.counts()

    def observe(self, registry: Registry) -> None:
        """Write the counters into the registry."""
        counts = self.counts()
        sums = {
            table.ENCODER_BATCHES: counts.batches,
            table.ENCODER_TEXTS: counts.texts,
            table.ENCODER_TOKENS: counts.tokens,
            table.ENCODER_SECONDS: counts.compute_s,
            table.ENCODER_SKIPPED: counts.skipped_texts,
        }
        for metric, total in sums.items():
            registry.counter(metric, self._config.name).value = float(total)

    def routes(self) -> tuple[str, ...]:
        """The paths of the configured tasks."""
        return tuple(path for path, task in ROUTES.items() if task in self._config.tasks)

    async def stop(self) -> None:
        """Fail what is open with ``UnavailableError`` and end the threads; safe to call twice."""
        if self._service is not None:
            await self._service.stop()
