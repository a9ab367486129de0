"""vLLM's arguments, from a generator's configuration and the platform."""

import difflib
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from cluster.config import PRIORITY_POLICY, GeneratorConfig
from cluster.errors import ConfigError

DEFAULT_CPU_KV_BYTES = 1024**3
GPU_MEMORY_UTILIZATION = 0.9  # of all replicas on a GPU; the rest is for CUDA contexts and graphs
EAGER_CPU_WORKER = "cluster.engines.vllm.cpu_worker.EagerCPUWorker"
_RESUMING = "cluster.engines.vllm.resuming"
CPU_BLOCK_SIZE_TOKENS = 32  # vLLM's default on CPUs, 128, is too coarse for sharing prefixes
_MODALITIES = ("image", "video", "audio")
_COMPACT_BACKENDS = ("auto", "xgrammar", "guidance")  # those with ``disable_any_whitespace``


def platform_defaults(
    config: GeneratorConfig, *, on_cpu: bool, in_ray: bool, native_bfloat16: bool = True
) -> dict[str, Any]:
    """Return arguments that apply where the configuration does not set them.

    Raises:
        ConfigError: ``engine_args`` has the executor ``ray`` on CPUs.
    """
    parallel = config.num_workers > 1
    if on_cpu:
        if config.engine_args.get("distributed_executor_backend") == "ray":
            raise ConfigError(
                f"generator {config.name!r}: engine_args.distributed_executor_backend is 'ray', "
                "which vLLM supports on GPUs only; remove it"
            )
        # Eager mode with a fixed cache size skips vLLM's warm-up.
        eager = config.engine_args.get("enforce_eager", True)
        return {
            "enforce_eager": True,
            **({"worker_cls": EAGER_CPU_WORKER} if eager else {}),
            "block_size": CPU_BLOCK_SIZE_TOKENS,
            "kv_cache_memory_bytes": DEFAULT_CPU_KV_BYTES,
            # vLLM's Ray executor does not support CPUs.
            "distributed_executor_backend": "mp" if parallel else None,
            # vLLM uses the model's own dtype, mostly bfloat16, even if the CPU emulates it:
            # SmolLM2 ran at half the speed of float32 on a CPU with AVX-512 but no AMX.
            "dtype": "auto" if native_bfloat16 else "float32",
        }
    if not parallel:
        share = config.resources.gpus
        if not 0 < share < 1:
            return {}
        # Replicas on one GPU: vLLM counts this share of the whole memory, and refuses to start if
        # less is free.
        return {"gpu_memory_utilization": round(GPU_MEMORY_UTILIZATION * share, 3)}
    # In a Serve replica, the workers must use the GPUs that its placement group reserved.
    return {"distributed_executor_backend": "ray" if in_ray else "mp"}


def kv_events_endpoint() -> str:
    """Return a new address for KV events: a Unix socket in the temporary directory."""
    return f"ipc://{tempfile.gettempdir()}/tandem-kv-{uuid4().hex}"


def fill_args(
    args: Namespace, config: GeneratorConfig, model_path: str, defaults: dict[str, Any]
) -> None:
    """Write the configuration into ``args``, which hold vLLM's defaults.

    Raises:
        ConfigError: ``engine_args`` has an unknown name.
    """
    _check_names(config, vars(args))
    chosen: dict[str, Any] = {
        **defaults,
        "enable_request_id_headers": True,
        "scheduling_policy": PRIORITY_POLICY,
        "limit_mm_per_prompt": dict.fromkeys(_MODALITIES, config.media.max_items),
        **config.engine_args,
        "model": model_path,
        "served_model_name": [config.name, *config.aliases],
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "quantization": config.quantization,
        "max_model_len": config.max_model_len,
    }
    if config.dtype != "auto":
        chosen["dtype"] = config.dtype
    if config.kv_cache_memory_bytes is not None:
        chosen["kv_cache_memory_bytes"] = int(config.kv_cache_memory_bytes)
    if config.has_loras:
        chosen |= {"enable_lora": True, "max_loras": config.max_loras}
    for name, value in chosen.items():
        setattr(args, name, value)


def disable_free_whitespace(structured_outputs: Any, config: GeneratorConfig) -> None:
    """Make JSON output compact, unless ``engine_args`` chooses or the backend cannot.

    Small models otherwise fill answers with whitespace, which every JSON schema allows, until
    ``max_tokens``.
    """
    chosen = config.engine_args.get("structured_outputs_config") or {}
    # vLLM rejects this for the backend "auto", because that may fall back to backends that ignore
    # it. Setting it after the check keeps the fallback.
    if "disable_any_whitespace" not in chosen and structured_outputs.backend in _COMPACT_BACKENDS:
        structured_outputs.disable_any_whitespace = True


def resume_answers(vllm_config: Any) -> bool:
    """Make the engine able to continue answers of other replicas; return False if it cannot.

    A scheduler or worker extension from ``engine_args`` is left alone. Models with an encoder, such
    as Whisper, would need its output as well.
    """
    if vllm_config.model_config.is_encoder_decoder:
        return False
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    if scheduler.scheduler_cls is not None or parallel.worker_extension_cls:
        return False
    name = "ResumingAsyncScheduler" if scheduler.async_scheduling else "ResumingScheduler"
    scheduler.scheduler_cls = f"{_RESUMING}.{name}"
    parallel.worker_extension_cls = f"{_RESUMING}.ResumingWorker"
    return True


def on_demand_bytes(vllm_config: Any) -> int:
    """Return the KV caches' memory that the workers take when blocks are first used, in bytes.

    Only ``EAGER_CPU_WORKER`` does so; others take all of it at the start.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.worker_cls != EAGER_CPU_WORKER:
        return 0
    return int(parallel.world_size * (cache.kv_cache_memory_bytes or 0))


def _check_names(config: GeneratorConfig, known: Iterable[str]) -> None:
    for name, value in config.engine_args.items():
        if name not in known:
            where = f"generator {config.name!r}: engine_args.{name}"
            near = difflib.get_close_matches(name, list(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{where}: vLLM has no such argument (value {value!r}){hint}")
