"""vLLM as an ``Engine``; one per process. Knows neither Ray Serve nor HTTP servers."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.asgi import ASGIApp
from cluster.config import GeneratorConfig
from cluster.engines.base import EngineWorker
from cluster.engines.prefix_cache import PrefixTracker, make_byte_lengths
from cluster.engines.vllm import internals
from cluster.engines.vllm.adapters import LoraAdapters
from cluster.engines.vllm.app import build_app, set_names
from cluster.engines.vllm.arguments import on_demand_bytes
from cluster.engines.vllm.cores import EngineCores
from cluster.engines.vllm.disconnect import CancelAsDisconnect
from cluster.engines.vllm.handover import hand_over_answers
from cluster.engines.vllm.inputs import ReadJson, reject_uncompiled
from cluster.engines.vllm.kv_events import KvEventReader
from cluster.engines.vllm.launcher import LlmLauncher
from cluster.engines.vllm.media import Media
from cluster.engines.vllm.pins import pin_times_and_ids
from cluster.engines.vllm.requests import (
    TrackRequest,
    count_aborted,
    count_prompts,
    count_usage,
    note_arrivals,
    observe_prompts,
)
from cluster.engines.vllm.routes import public_routes
from cluster.engines.vllm.speech import Speech
from cluster.engines.vllm.workers import find_workers
from cluster.errors import EngineDeadError
from cluster.link import Adapters
from cluster.load import Load
from cluster.metrics import Registry, table
from cluster.models.hub import download
from cluster.periodic import Periodic

logger = logging.getLogger(__name__)


class VllmEngine:
    """``Engine`` over vLLM.

    Args:
        config: Configuration of the pool.
        model_path: Model directory or Hugging Face id.
        resolve: Returns the directory or id of a configured path of a LoRA adapter.
        ray_metrics: Export vLLM's metrics through Ray, which must run in this process.
        traces_endpoint: OTLP/HTTP endpoint for vLLM's spans; None disables them.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        model_path: str,
        resolve: Callable[[str], str] = str,
        *,
        ray_metrics: bool = False,
        traces_endpoint: str | None = None,
    ) -> None:
        adapter_paths = {name: resolve(path) for name, path in config.adapters.items()}
        self._launcher = LlmLauncher(config, model_path, adapter_paths, traces_endpoint)
        self._config = config
        self._resolve = resolve
        self._speech = Speech(config.audio)
        self._adapters: LoraAdapters | None = None
        self._ray_metrics = ray_metrics
        self._llm: Any = None
        self._vllm_app: Any = None
        self.app: ASGIApp
        self._cores = EngineCores(config.stall_timeout_s)
        self.prefixes: PrefixTracker | None = None
        self._kv_events: asyncio.Task[None] | None = None
        self._stats: Periodic | None = None
        self._media = Media(config.media)
        self._num_workers = config.num_workers
        self.workers: Sequence[EngineWorker] = ()
        self.on_demand_bytes = 0

    @property
    def start_phases_s(self) -> dict[str, float]:
        return self._launcher.timer.phases_s

    @property
    def context_tokens(self) -> int | None:
        return int(self._llm.model_config.max_model_len)

    @property
    def resume_key(self) -> str:
        return self._launcher.resume_key

    @property
    def adapters(self) -> Adapters:
        return self._adapters.state if self._adapters is not None else Adapters()

    async def start(self) -> None:
        try:
            started = await self._launcher.start(self._make_stat_loggers)
            self._llm = started.llm
            self.on_demand_bytes = on_demand_bytes(self._llm.vllm_config)
            self._cores.max_num_seqs = self._llm.vllm_config.scheduler_config.max_num_seqs
            if self.resume_key:  # the workers have our extension
                hand_over_answers(self._llm)
                self.workers = await find_workers(self._llm, self._num_workers)
            if started.kv_events_endpoint is not None:
                await self._track_prefixes(started.kv_events_endpoint)
            self._count_usage()
            self._media.install()
            self._vllm_app = await build_app(self._llm, started.args, self._speech)
            self._adapters = LoraAdapters(
                self._llm,
                self._vllm_app.state.openai_serving_models,
                self._config.adapters,
                self._find_adapter,
            )
            pin_times_and_ids()
            self.app = TrackRequest(
                ReadJson(CancelAsDisconnect(self._vllm_app)), self._launcher.arrivals
            )
            self._launcher.timer.mark("application")
        except BaseException:
            await self.stop()
            raise
        # Normally a task of the lifespan of vLLM's application, which does not run here.
        interval_s = internals.envs.VLLM_LOG_STATS_INTERVAL
        self._stats = Periodic("vLLM's statistics", interval_s, self._llm.do_log_stats)
        phases = ", ".join(f"{phase} {took_s:.1f}" for phase, took_s in self.start_phases_s.items())
        logger.info("vLLM is ready; startup phases in seconds: %s", phases)

    async def reconfigure(self, pool: GeneratorConfig) -> None:
        self._cores.set_stall_timeout(pool.stall_timeout_s)
        self._media.configure(pool.media)
        self._speech.config = pool.audio
        set_names(self._vllm_app.state.openai_serving_models, (pool.name, *pool.aliases))
        if self._adapters is not None:
            await self._adapters.apply(pool.adapters)

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine's process does not run, or hangs."""
        if self._llm is None or self._launcher.is_stopping:
            raise EngineDeadError("The engine of the replica is not running; try again.")
        try:
            await self._llm.check_health()
        except internals.EngineDeadError:
            raise EngineDeadError("The engine of the replica died; try again.") from None
        self._cores.check(_unfinished_by_core(self._llm))

    def load(self) -> Load:
        if self._llm is None:
            return Load()
        return self._cores.load(self._llm.get_num_unfinished_requests())

    def observe(self, registry: Registry) -> None:
        """Write the counts of media; vLLM exports its metrics to Ray itself (``ray_metrics``)."""
        if self._speech.audio_s:
            registry.counter(table.AUDIO_SECONDS, self._config.name).value = self._speech.audio_s
        for outcome, count in self._media.counts.items():
            registry.counter(table.MEDIA_FETCHES, self._config.name, outcome).value = count

    def routes(self) -> tuple[str, ...]:
        return public_routes(self._vllm_app)

    async def stop(self) -> None:
        if self._stats is not None:
            await self._stats.close()
        if self._kv_events is not None:
            self._kv_events.cancel()
            await asyncio.wait([self._kv_events])
        await self._launcher.stop()

    def _find_adapter(self, path: str) -> str:
        """Return the directory of an adapter; downloads it if necessary."""
        found = self._resolve(path)
        # vLLM would download it in the engine's process, and all requests would wait.
        return found if Path(found).is_dir() else download(found)

    def _count_usage(self) -> None:
        llm, outputs = self._llm, self._llm.output_processor
        llm.generate = reject_uncompiled(count_usage(llm.generate))
        llm.engine_core.add_request_async = note_arrivals(llm.engine_core.add_request_async)
        llm.encode = count_prompts(llm.encode)
        llm.abort = count_aborted(llm.abort, outputs.request_states, outputs.parent_requests)

    async def _track_prefixes(self, kv_events_endpoint: str) -> None:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            return
        byte_lengths = await asyncio.to_thread(
            make_byte_lengths,
            tokenizer.get_vocab(),
            (*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())),
        )
        block_size = self._llm.vllm_config.cache_config.block_size
        self.prefixes = PrefixTracker(block_size, byte_lengths)
        self._llm.generate = observe_prompts(self._llm.generate, self.prefixes)
        reading = KvEventReader(self.prefixes, kv_events_endpoint).run()
        self._kv_events = asyncio.create_task(reading, name="vllm-kv-events")

    def _make_stat_loggers(self) -> list[Any]:
        cores = self._cores

        class LoadLogger(internals.StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self._index = engine_index
                cores.add(engine_index)

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                cores.count_step(self._index, scheduler_stats)

            def log_engine_initialized(self) -> None:
                pass

        return [LoadLogger, *([internals.RayPrometheusStatLogger] if self._ray_metrics else [])]


def _unfinished_by_core(llm: Any) -> list[int]:
    core = llm.engine_core
    if hasattr(core, "engine_inflight"):  # vLLM balances data-parallel cores
        return [core.engine_inflight[engine] for engine in core.core_engines]
    return [llm.get_num_unfinished_requests()]
