"""Start and stop of vLLM's engine and its processes."""

import asyncio
import importlib
import logging
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.config import GeneratorConfig
from cluster.engines.startup import StartupTimer, gc_disabled
from cluster.engines.vllm import arguments, environment, forking, internals
from cluster.engines.vllm.bursts import Arrivals
from cluster.engines.vllm.journal import resume_key
from cluster.engines.vllm.parser_choice import set_parsers
from cluster.engines.vllm.worker_watch import watch_workers
from cluster.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class StartedLlm:
    """``AsyncLLM`` with running processes."""

    llm: Any
    args: Namespace
    """All arguments of vLLM's server."""
    kv_events_endpoint: str | None
    """Address of the KV events; None if there are none, or they go elsewhere."""


class LlmLauncher:
    """Owner of vLLM's engine, its processes and the thread that starts them.

    The kernel kills vLLM's processes when the thread that forked them ends (``lifeline``), so one
    thread starts them and then only waits until they are to stop.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        model_path: str,
        adapter_paths: Mapping[str, str],
        traces_endpoint: str | None,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._adapter_paths = adapter_paths
        self._traces_endpoint = traces_endpoint
        self._thread: threading.Thread | None = None
        self._stop_requested = threading.Event()
        self._environment = environment.Environment()
        self._sockets: Any = None
        self.timer = StartupTimer()
        self.arrivals = Arrivals()
        """Requests that are prepared for the engine."""
        self.resume_key = ""
        """See ``Engine.resume_key``."""

    @property
    def is_stopping(self) -> bool:
        return self._stop_requested.is_set()

    async def start(self, make_stat_loggers: Callable[[], list[Any]]) -> StartedLlm:
        """Start vLLM's processes and load the model.

        Sets environment variables of this process until ``stop`` (``environment``).
        """
        loop = asyncio.get_running_loop()
        started: asyncio.Future[StartedLlm] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run,
            args=(loop, started, make_stat_loggers),
            name="vllm-engine",
            daemon=True,
        )
        self._thread.start()
        return await started

    async def stop(self) -> None:
        """Stop vLLM's processes; kill those that do not exit in time."""
        self._stop_requested.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._sockets is not None:
            # vLLM closes its sockets in the event loop, but never destroys their context.
            await asyncio.sleep(0)
            self._sockets.destroy(linger=0)
        self._environment.restore()

    def _run(
        self,
        loop: asyncio.AbstractEventLoop,
        started: "asyncio.Future[StartedLlm]",
        make_stat_loggers: Callable[[], list[Any]],
    ) -> None:
        try:
            result = self._start_llm(make_stat_loggers)
        except BaseException as error:  # raised by ``start``
            _resolve(loop, started.set_exception, error)
            return
        llm = result.llm
        processes: list[psutil.Process] = []
        try:
            self._sockets = llm.engine_core.resources.ctx
            cores = _cores_of(llm)
            processes = _with_children(cores)
            watch_workers(cores, self._stop_requested.is_set)
        except BaseException as error:  # raised by ``start``
            _resolve(loop, started.set_exception, error)
        else:
            _resolve(loop, started.set_result, result)
            self._stop_requested.wait()
        try:
            llm.shutdown(timeout=_STOP_TIMEOUT_S)
        finally:
            _kill(processes)

    def _start_llm(self, make_stat_loggers: Callable[[], list[Any]]) -> StartedLlm:
        may_fork = forking.may_fork(os.environ, self._config)
        may_fork = may_fork and forking.load_intel_openmp(os.environ)
        model_paths = self._model_path, *self._adapter_paths.values()
        self._environment.set_defaults(environment.base_environment(*model_paths))
        self.timer = StartupTimer()
        with gc_disabled():
            args, kv_events_endpoint = self._make_args()
            async_llm = internals.AsyncLLM
        self.timer.mark("imports")

        vllm_config = self._make_vllm_config(args)
        if not vllm_config.cache_config.enable_prefix_caching:
            kv_events_endpoint = None
        self.timer.mark("configuration")
        if self.is_stopping:
            raise EngineDeadError("the engine was stopped while it started")
        forks = may_fork and bool(internals.current_platform.is_cpu())
        try:
            with forking.forked_engine(self.arrivals) if forks else _app_imports():
                llm = async_llm.from_vllm_config(vllm_config, stat_loggers=make_stat_loggers())
        except Exception as error:
            raise EngineDeadError(f"vLLM's engine did not start: {error}") from error
        self.timer.mark("engine process and model")
        return StartedLlm(llm, args, kv_events_endpoint)

    def _make_vllm_config(self, args: Namespace) -> Any:
        make_args = internals.AsyncEngineArgs.from_cli_args
        try:
            set_parsers(args, make_args(args).create_model_config(), self._config)
            made = make_args(args).create_engine_config()
        except (ValueError, OSError, TypeError, AssertionError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"generator {self._config.name!r}: vLLM rejects the configuration: {reason}"
            ) from error
        # vLLM checks the configuration of a multimodal model again when it builds the parts.
        if not made.model_config.is_multimodal_model:
            arguments.disable_free_whitespace(made.structured_outputs_config, self._config)
        if arguments.resume_answers(made):
            max_model_len = made.model_config.max_model_len
            self.resume_key = resume_key(self._config, self._model_path, max_model_len)
        return made

    def _make_args(self) -> tuple[Namespace, str | None]:
        """Return vLLM's arguments, and the address of the KV events if this replica reads them."""
        from cluster.cpu import has_native_bfloat16

        on_cpu = bool(internals.current_platform.is_cpu())
        if on_cpu:
            if (binding := os.environ.get(environment.BINDING_VARIABLE)) is not None:
                environment.check_binding(binding, self._config, os.sched_getaffinity(0))
            self._environment.set_defaults(environment.cpu_environment(self._config))
            self._environment.set_all(environment.threads_environment(os.environ))
            self._environment.set_all(environment.preload_environment(os.environ))
        ray_address = _ray_address()
        if ray_address is not None:  # for an engine process that uses Ray's executor
            self._environment.set_defaults({"RAY_ADDRESS": ray_address})
        args: Namespace = internals.make_arg_parser(internals.FlexibleArgumentParser()).parse_args(
            []
        )
        defaults = arguments.platform_defaults(
            self._config,
            on_cpu=on_cpu,
            in_ray=ray_address is not None,
            native_bfloat16=has_native_bfloat16(),
        )
        if self._traces_endpoint is not None:
            self._environment.set_defaults(environment.TRACING_ENVIRONMENT)
            defaults["otlp_traces_endpoint"] = self._traces_endpoint
        arguments.fill_args(args, self._config, self._model_path, defaults)
        if self._adapter_paths:
            args.lora_modules = [
                internals.LoRAModulePath(name, path) for name, path in self._adapter_paths.items()
            ]
        if args.kv_events_config is not None or args.enable_prefix_caching is False:
            return args, None
        endpoint = arguments.kv_events_endpoint()
        args.kv_events_config = internals.KVEventsConfig(
            enable_kv_cache_events=True, endpoint=endpoint
        )
        return args, endpoint


@contextmanager
def _app_imports() -> Iterator[None]:
    """Import the application's modules meanwhile."""
    imports = threading.Thread(target=_import_app, name="vllm-imports")
    imports.start()
    yield
    imports.join()


def _import_app() -> None:
    for module in internals.APP_MODULES:
        importlib.import_module(module)


def _ray_address() -> str | None:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address


def _resolve(loop: asyncio.AbstractEventLoop, setter: Callable[[Any], None], value: Any) -> None:
    def resolve() -> None:
        with suppress(asyncio.InvalidStateError):  # ``start`` was cancelled
            setter(value)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(resolve)


def _cores_of(llm: Any) -> list[psutil.Process]:
    manager = getattr(llm.engine_core.resources, "engine_manager", None)
    found: list[psutil.Process] = []
    for process in getattr(manager, "processes", ()):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(process.pid))
    return found


def _with_children(cores: list[psutil.Process]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for core in cores:
        with suppress(psutil.NoSuchProcess):
            found += [*core.children(recursive=True), core]
    return found


def _kill(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=2.0)
    for process in alive:
        logger.warning("killing %s: it did not exit with its engine", process)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=2.0)
