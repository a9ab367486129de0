"""What vLLM is told at its start: environment variables and arguments, from the configuration.

Pure but for ``Environment``; does not import vllm.
"""

import difflib
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any
from uuid import uuid4

from cluster.config import PRIORITY_POLICY, GeneratorConfig
from cluster.engines.lifeline import PARENT_VARIABLE
from cluster.errors import ConfigError

DEFAULT_CPU_KV_BYTES = 1024**3
BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
EAGER_CPU_WORKER = "cluster.engines.cpu_worker.EagerCPUWorker"
CPU_BLOCK_SIZE_TOKENS = 32  # vLLM's own on CPUs, 128, is too coarse to share prefixes by
TRACING_ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
"""vLLM sends its spans by gRPC unless told so; Tandem's own go by HTTP to the same place."""

_FIELDS = {  # vLLM's names that the configuration has a field for
    "model": "model",
    "served_model_name": "name",
    "enable_lora": "adapters",
    "lora_modules": "adapters",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "dtype": "dtype",
    "quantization": "quantization",
    "max_model_len": "max_model_len",
    "kv_cache_memory_bytes": "kv_cache_memory_bytes",
}


def environment_for(*paths: str) -> dict[str, str]:
    """What vLLM reads from the environment, to be set before it is imported.

    VLLM_LOGGING_LEVEL=WARNING, VLLM_NO_USAGE_STATS=1, DO_NOT_TRACK=1,
    VLLM_WORKER_MULTIPROC_METHOD=spawn, TANDEM_ENGINE_PARENT (this process), and where the
    model and its adapters are local HF_HUB_OFFLINE=1.
    """
    wanted = {
        PARENT_VARIABLE: str(os.getpid()),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if all(os.path.isdir(path) for path in paths):
        wanted["HF_HUB_OFFLINE"] = "1"
    return wanted


def cpu_environment_for(config: GeneratorConfig) -> dict[str, str]:
    """What vLLM reads from the environment where it computes on CPUs.

    VLLM_ENABLE_V1_MULTIPROCESSING=0 runs the worker in the engine's process, one fewer to start;
    VLLM_CPU_OMP_THREADS_BIND gives it all cores (vLLM by itself leaves one idle).
    """
    binding = bind_threads(sorted(os.sched_getaffinity(0)), config.num_workers)
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", BINDING_VARIABLE: binding}


def threads_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS for the cores that VLLM_CPU_OMP_THREADS_BIND names; {} if it names none.

    vLLM does so for workers in processes of their own. It has to replace what is set: Ray sets it
    to the CPUs that a replica asks for, rounded down, and so to 1 where replicas share cores.
    """
    threads = threads_of(environment[BINDING_VARIABLE])
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def threads_of(binding: str) -> int | None:
    """How many threads a worker gets by vLLM's ``binding`` (``0,1|2-3``); None: its own choice."""
    threads = 0
    for part in binding.split("|")[0].split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return None  # auto, nobind
        threads += int(last or first) - int(first) + 1
    return threads


class Environment:
    """Variables set for as long as an engine runs."""

    def __init__(self, variables: MutableMapping[str, str] = os.environ) -> None:
        self._variables = variables
        self._before: dict[str, str | None] = {}

    def add(self, wanted: dict[str, str]) -> None:
        """Set those of ``wanted`` that are not set."""
        self.replace({n: value for n, value in wanted.items() if n not in self._variables})

    def replace(self, wanted: dict[str, str]) -> None:
        """Set ``wanted``, whatever was set."""
        for name, value in wanted.items():
            self._before.setdefault(name, self._variables.get(name))
            self._variables[name] = value

    def restore(self) -> None:
        """Make it as it was before."""
        for name, value in self._before.items():
            self._variables.pop(name, None)
            if value is not None:
                self._variables[name] = value
        self._before.clear()


def bind_threads(cores: list[int], workers: int) -> str:
    """``cores`` divided among ``workers`` in vLLM's form: ``0,1`` for one, ``0|1`` for two."""
    share = max(1, len(cores) // workers)
    turns = [cores[i % len(cores)] for i in range(share * workers)]
    parts = [turns[i : i + share] for i in range(0, len(turns), share)]
    return "|".join(",".join(map(str, part)) for part in parts)


def platform_defaults(
    config: GeneratorConfig, *, on_cpu: bool, in_ray: bool, native_bfloat16: bool = True
) -> dict[str, Any]:
    """What Tandem chooses where the configuration does not."""
    parallel = config.num_workers > 1
    if on_cpu:
        # Eager, with a given cache size, skips vLLM's warm-up; the Ray executor refuses CPUs.
        eager = config.engine_args.get("enforce_eager", True)
        return {
            "enforce_eager": True,
            **({"worker_cls": EAGER_CPU_WORKER} if eager else {}),
            "block_size": CPU_BLOCK_SIZE_TOKENS,
            "kv_cache_memory_bytes": DEFAULT_CPU_KV_BYTES,
            "distributed_executor_backend": "mp" if parallel else None,
            # vLLM takes the model's own type, mostly bfloat16, also where that is emulated:
            # SmolLM2 was half as fast in it as in float32 on a processor with AVX-512 alone.
            "dtype": "auto" if native_bfloat16 else "float32",
        }
    if not parallel:
        return {}
    # In a Serve replica the workers go where its placement group reserved their GPUs.
    return {"distributed_executor_backend": "ray" if in_ray else "mp"}


def events_endpoint() -> str:
    """Where the engine's process says what it has in its KV cache: a socket of this user alone."""
    return f"ipc://{tempfile.gettempdir()}/tandem-kv-{uuid4().hex}"


def fill_args(
    args: Namespace, config: GeneratorConfig, model_path: str, defaults: dict[str, Any]
) -> None:
    """Put the configuration into vLLM's ``args``, which hold its own defaults.

    Raises:
        ConfigError: ``engine_args`` has a name that vLLM does not, or one that has its own field.
    """
    _check_names(config, vars(args))
    chosen: dict[str, Any] = {
        **defaults,
        "enable_request_id_headers": True,
        "scheduling_policy": PRIORITY_POLICY,
        **config.engine_args,
        "model": model_path,
        "served_model_name": [config.name],
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "quantization": config.quantization,
        "max_model_len": config.max_model_len,
    }
    if config.dtype != "auto":
        chosen["dtype"] = config.dtype
    if config.kv_cache_memory_bytes is not None:
        chosen["kv_cache_memory_bytes"] = int(config.kv_cache_memory_bytes)
    if config.adapters:
        chosen |= {"enable_lora": True, "max_loras": config.max_loras}
    for name, value in chosen.items():
        setattr(args, name, value)


def _check_names(config: GeneratorConfig, known: Iterable[str]) -> None:
    for name, value in config.engine_args.items():
        where = f"generator {config.name!r}: engine_args.{name}"
        if name in _FIELDS:
            raise ConfigError(f"{where}: got {value!r}; set the generator's `{_FIELDS[name]}`")
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{where}: vLLM has no such argument (value {value!r}){hint}")
