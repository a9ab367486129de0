"""vLLM as an ``Engine``: its asynchronous engine and, around it, its own OpenAI application.

The only module that imports vllm, and only when an engine starts. Owns the engine, its processes
and the thread that started them; there is one in a process. Knows nothing of Ray Serve or of
HTTP servers.
"""

import asyncio
import importlib
import logging
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil

from cluster.asgi import ASGIApp
from cluster.config import GeneratorConfig
from cluster.engines import vllm_args
from cluster.engines.leave import CancelAsLeave
from cluster.engines.prefix_cache import PrefixTracker, byte_lengths_of
from cluster.engines.startup import StartupTimer, gc_disabled
from cluster.engines.vllm_events import KvEvents
from cluster.engines.vllm_prompts import KeepBody, shown
from cluster.engines.vllm_usage import CountUsage, counted
from cluster.errors import ConfigError, EngineDeadError
from cluster.load import Load
from cluster.metrics import Registry

logger = logging.getLogger(__name__)

PUBLIC_PATHS = (
    "/v1/",
    "/v2/",
    "/tokenize",
    "/detokenize",
    "/inference/v1/generate",
    "/generative_scoring",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
)
"""Prefixes of what clients may call. vLLM's application also has paths that observe it (/metrics,
/load, /health, /ping, /version, /kv_event_sources, /docs), that stand for any other
(/invocations), that end other clients' requests (/inference/v1/abort_requests) and that change
the engine (/scale_elastic_ep; in its development mode /sleep, /pause, /collective_rpc, ...)."""
OPENAPI_PATH = "/openapi.json"
"""Served, but for the router: it makes one document out of those of all engines."""
PRIVATE_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

_APP_MODULES = (  # what the application needs, imported while the engine's process starts
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.serve",
)
_STOP_TIMEOUT_S = 10.0


class VllmEngine:
    """``Engine`` over vLLM.

    Args:
        config: The pool's configuration.
        model_path: A model directory or a Hugging Face id.
        adapter_paths: The same of each LoRA adapter, by its name.
        ray_metrics: Also give vLLM's metrics to Ray, which must run in this process.
        traces_endpoint: Where vLLM sends its own spans (OTLP over HTTP); None: nowhere.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        model_path: str,
        adapter_paths: Mapping[str, str] | None = None,
        *,
        ray_metrics: bool = False,
        traces_endpoint: str | None = None,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._adapter_paths = dict(adapter_paths or {})
        self._ray_metrics = ray_metrics
        self._traces_endpoint = traces_endpoint
        self._llm: Any = None
        self._app: Any = None
        self._asgi: ASGIApp
        self._scheduler_stats: Any = None
        self._sockets: Any = None
        self._events_endpoint: str | None = None
        self._prefixes: PrefixTracker | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._keeper: threading.Thread | None = None
        self._stopping = threading.Event()
        self._environment = vllm_args.Environment()
        self._timer = StartupTimer()

    @property
    def start_phases_s(self) -> dict[str, float]:
        """See ``Engine``."""
        return self._timer.phases_s

    @property
    def app(self) -> ASGIApp:
        """vLLM's application; valid between ``start`` and ``stop``."""
        return self._asgi

    @property
    def prefixes(self) -> PrefixTracker | None:
        """What its KV blocks hold; None where prefix caching is off, or KV events go elsewhere."""
        return self._prefixes

    async def start(self) -> None:
        """Start vLLM's processes, load the model, build the application.

        Sets environment variables for this process and vLLM's (``vllm_args.environment_for``).
        """
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[tuple[Any, Namespace]] = loop.create_future()
        self._keeper = threading.Thread(
            target=self._keep, args=(loop, ready), name="vllm-engine", daemon=True
        )
        self._keeper.start()
        try:
            self._llm, args = await ready
            if self._events_endpoint is not None:
                await self._follow_cache(self._events_endpoint)
            self._app = await _build_app(self._llm, args)
            self._asgi = CountUsage(KeepBody(CancelAsLeave(self._app)))
            self._timer.mark("application")
        except BaseException:
            await self.stop()
            raise
        self._tasks.append(asyncio.create_task(self._log_stats(), name="vllm-stats"))
        took = ", ".join(f"{phase} {took_s:.1f}" for phase, took_s in self.start_phases_s.items())
        logger.info("vLLM is ready (seconds: %s)", took)

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine's process is gone or never was."""
        if self._llm is None or self._stopping.is_set():
            raise EngineDeadError("the engine does not run")
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        try:
            await self._llm.check_health()
        except VllmEngineDeadError as error:
            raise EngineDeadError(str(error)) from None

    def load(self) -> Load:
        """The load now.

        vLLM tells its load with each step, so not after an abort that leaves it idle; how many
        requests it has is known here at once.
        """
        if self._llm is None:
            return Load()
        unfinished = self._llm.get_num_unfinished_requests()
        stats = self._scheduler_stats
        if stats is None or not unfinished:
            return Load(running=unfinished)
        waiting = min(stats.num_waiting_reqs, unfinished)
        return Load(unfinished - waiting, waiting, stats.kv_cache_usage)

    def observe(self, registry: Registry) -> None:
        """Nothing: vLLM gives its metrics to Ray itself (``ray_metrics``)."""

    def routes(self) -> tuple[str, ...]:
        """The paths that clients may call; ``app`` serves these and ``OPENAPI_PATH`` only."""
        paths = dict.fromkeys(route.path for route in self._app.router.routes)
        return tuple(path for path in paths if path != OPENAPI_PATH)

    async def stop(self) -> None:
        """End vLLM's processes; those that do not end in time are killed."""
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._keeper is not None:
            await asyncio.to_thread(self._keeper.join)
        if self._sockets is not None:
            await asyncio.sleep(0)  # vLLM closes its sockets in the loop, and leaves their context
            self._sockets.destroy(linger=0)
        self._environment.restore()

    async def _follow_cache(self, endpoint: str) -> None:
        """Learn what the engine's KV blocks hold, from now on."""
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            return
        lengths = await asyncio.to_thread(
            byte_lengths_of,
            tokenizer.get_vocab(),
            (*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())),
        )
        block_size = self._llm.vllm_config.cache_config.block_size
        self._prefixes = PrefixTracker(block_size, lengths)
        self._llm.generate = shown(self._llm.generate, self._prefixes)
        reading = KvEvents(self._prefixes, endpoint).run()
        self._tasks.append(asyncio.create_task(reading, name="vllm-kv-events"))

    def _keep(
        self,
        loop: asyncio.AbstractEventLoop,
        ready: "asyncio.Future[tuple[Any, Namespace]]",
    ) -> None:
        """Start the engine and stay until it stops.

        The kernel ends vLLM's processes when the thread that started them ends (``lifeline``),
        so one thread does nothing else for as long as they live.
        """
        try:
            llm, args = self._start_engine()
        except BaseException as error:  # handed to ``start``, which raises it
            self._answer(loop, ready.set_exception, error)
            return
        self._sockets = llm.engine_core.resources.ctx
        processes = _processes_of(llm)
        self._answer(loop, ready.set_result, (llm, args))
        self._stopping.wait()
        try:
            llm.shutdown(timeout=_STOP_TIMEOUT_S)
        finally:
            _kill(processes)

    def _answer(
        self, loop: asyncio.AbstractEventLoop, setter: Callable[[Any], None], value: Any
    ) -> None:
        def answer() -> None:
            with suppress(asyncio.InvalidStateError):  # nobody waits any more
                setter(value)

        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(answer)

    def _start_engine(self) -> tuple[Any, Namespace]:
        self._environment.add(
            vllm_args.environment_for(self._model_path, *self._adapter_paths.values())
        )
        self._timer = StartupTimer()
        with gc_disabled():
            args = self._make_args()
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        self._timer.mark("imports")

        try:
            vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        except (ValueError, OSError, TypeError, AssertionError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"generator {self._config.name!r}: vLLM refuses: {reason}") from error
        if not vllm_config.cache_config.enable_prefix_caching:
            self._events_endpoint = None
        self._timer.mark("configuration")
        if self._stopping.is_set():
            raise EngineDeadError("the engine was stopped while it started")
        imports = threading.Thread(target=_import_all, args=(_APP_MODULES,), name="vllm-imports")
        imports.start()
        try:
            llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=self._stat_loggers())
        except Exception as error:
            raise EngineDeadError(f"vLLM's engine did not start: {error}") from error
        imports.join()
        self._timer.mark("engine process and model")
        return llm, args

    def _make_args(self) -> Namespace:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from cluster.engines.cpu import computes_in_bfloat16

        on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            self._environment.add(vllm_args.cpu_environment_for(self._config))
            self._environment.replace(vllm_args.threads_environment(os.environ))
        ray = sys.modules.get("ray")
        in_ray = ray is not None and bool(ray.is_initialized())
        if ray is not None and in_ray:  # for an engine process whose executor is Ray's
            address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            self._environment.add(address)
        args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        defaults = vllm_args.platform_defaults(
            self._config, on_cpu=on_cpu, in_ray=in_ray, native_bfloat16=computes_in_bfloat16()
        )
        if self._traces_endpoint is not None:
            self._environment.add(vllm_args.TRACING_ENVIRONMENT)
            defaults["otlp_traces_endpoint"] = self._traces_endpoint
        vllm_args.fill_args(args, self._config, self._model_path, defaults)
        if self._adapter_paths:
            from vllm.entrypoints.openai.models.protocol import LoRAModulePath

            args.lora_modules = [LoRAModulePath(*each) for each in self._adapter_paths.items()]
        if args.kv_events_config is None and args.enable_prefix_caching is not False:
            from vllm.config import KVEventsConfig

            self._events_endpoint = vllm_args.events_endpoint()
            args.kv_events_config = KVEventsConfig(
                enable_kv_cache_events=True, endpoint=self._events_endpoint
            )
        return args

    def _stat_loggers(self) -> list[Any]:
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class LoadLogger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    engine._scheduler_stats = scheduler_stats

            def log_engine_initialized(self) -> None:
                pass

        if not self._ray_metrics:
            return [LoadLogger]
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        return [LoadLogger, RayPrometheusStatLogger]

    async def _log_stats(self) -> None:
        """What the lifespan of vLLM's application would do; nobody runs it here."""
        from vllm import envs

        while True:
            await asyncio.sleep(envs.VLLM_LOG_STATS_INTERVAL)
            await self._llm.do_log_stats()


async def _build_app(llm: Any, args: Namespace) -> Any:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    # vLLM's handler of engine errors tells its server to exit; without one it would hide them.
    app.state.server = SimpleNamespace(should_exit=False)
    llm.generate = counted(llm.generate)
    await init_app_state(llm, app.state, args, tasks)
    app.router.routes[:] = [route for route in app.router.routes if _is_public(route)]
    return app


def _is_public(route: Any) -> bool:
    path = getattr(route, "path", "")
    if not getattr(route, "methods", None):  # websockets and mounts
        return False
    return path == OPENAPI_PATH or (path.startswith(PUBLIC_PATHS) and path not in PRIVATE_PATHS)


def _import_all(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


def _processes_of(llm: Any) -> list[psutil.Process]:
    """The engine's processes and their workers."""
    manager = getattr(llm.engine_core.resources, "engine_manager", None)
    found: list[psutil.Process] = []
    for process in getattr(manager, "processes", ()):
        with suppress(psutil.NoSuchProcess):
            core = psutil.Process(process.pid)
            found += [*core.children(recursive=True), core]
    return found


def _kill(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=2.0)
    for process in alive:
        logger.warning("killing %s, which outlived its engine", process)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=2.0)
