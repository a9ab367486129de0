"""vLLM worker for CPUs: direct calls of vLLM's kernels, huge pages, one process group, less memory.

vLLM imports it by name (``arguments.EAGER_CPU_WORKER``) in the process that runs the worker. vLLM
0.32 builds these kernels for CPUs but selects them on GPUs only; on CPUs it computes RMSNorm with
seven PyTorch operations, which are meant to be compiled. Importing this module registers the
kernels; the worker selects them. Layers of Llama models call theirs directly (``direct_layers``).

The weights move to huge pages, which a step of a few tokens reads a quarter faster: it reads all
weights once, and address translation takes long in virtual machines.

vLLM also makes a dozen process groups of PyTorch's Gloo, each with a thread that wakes up 100 times
a second, in which it takes a core from the threads that compute. A lone worker's groups are all the
same, so they share one, and its thread is the only one left. The kernel may delay the timeouts of
these threads, which wait for nothing else in them.

vLLM fills the KV cache with zeros, so that all of it takes memory from the start. Here, a block
takes memory from its first use on.

And vLLM packs each embedding for multiplications. Here, it does so when one is multiplied: a model
that has a separate output layer, even with the same weights, only looks up its input embedding.
"""

import mmap
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed

from cluster.engines.vllm.direct_layers import NORM_ELEMENTS, call_kernels_directly
from cluster.engines.vllm.internals import (
    CPUWorker,
    ParallelLMHead,
    gpu_model_runner,
    ir,
    layer_utils,
    topk_topp_sampler,
)
from cluster.engines.vllm.top_p import apply_top_k_top_p
from cluster.memory import release_free_memory, use_huge_pages
from cluster.timers import late_timeouts

PROVIDER = "tandem"
GLOO_SLACK_S = 0.2
"""Delay of the timeouts in Gloo's threads, in seconds. Messages wake them at once."""


class EagerCPUWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not typed
    """Worker for models that are not compiled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            op.set_default([PROVIDER, "native"])
        topk_topp_sampler.apply_top_k_top_p = apply_top_k_top_p

    def init_device(self) -> None:
        if self.parallel_config.world_size_across_dp == 1:
            _share_process_group()
        with late_timeouts(GLOO_SLACK_S):
            super().init_device()
        gpu_model_runner.allocate_kv_cache = _allocate_on_touch(gpu_model_runner.allocate_kv_cache)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        dispatch = layer_utils.dispatch_cpu_unquantized_gemm
        layer_utils.dispatch_cpu_unquantized_gemm = pack = _PackWhenMultiplied(dispatch)
        try:
            super().load_model(*args, **kwargs)
        finally:
            layer_utils.dispatch_cpu_unquantized_gemm = dispatch
        model = self.model_runner.get_model()
        pack.finish(model.modules())
        if self.vllm_config.kv_transfer_config is None:  # a connector acts in vLLM's layers
            call_kernels_directly(model)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        release_free_memory()
        # It takes a second, which a start need not wait for.
        threading.Thread(target=use_huge_pages, name="huge-pages", daemon=True).start()
        return result


def _allocate_on_touch(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's ``allocate_kv_cache`` with memory that the kernel provides on first use."""

    def allocate_on_touch(*args: Any, **kwargs: Any) -> Any:
        zeros, torch.zeros = torch.zeros, _zeros_on_touch  # type: ignore[assignment]
        try:
            return allocate(*args, **kwargs)
        finally:
            torch.zeros = zeros

    return allocate_on_touch


def _zeros_on_touch(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype)


class _PackWhenMultiplied:
    """vLLM's ``dispatch_cpu_unquantized_gemm``, which packs input embeddings when they are used."""

    def __init__(self, dispatch: Callable[..., None]) -> None:
        self._dispatch = dispatch
        self._waiting: list[Any] = []

    def __call__(self, layer: Any, remove_weight: bool) -> None:
        if remove_weight or isinstance(layer, ParallelLMHead):
            self._dispatch(layer, remove_weight)
            return

        def pack_and_multiply(*args: Any) -> Any:
            self._dispatch(layer, remove_weight)  # replaces this function
            return layer.cpu_linear(*args)

        layer.cpu_linear = pack_and_multiply
        self._waiting.append(layer)

    def finish(self, modules: Iterable[Any]) -> None:
        """Pack the embeddings now if the model has no output layer besides them."""
        if not any(isinstance(module, ParallelLMHead) for module in modules):
            for layer in self._waiting:
                self._dispatch(layer, remove_weight=False)


def _share_process_group() -> None:
    """Make ``new_group`` of PyTorch return the group of all ranks, which is this process."""
    destroy = torch.distributed.destroy_process_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return torch.distributed.group.WORLD

    def destroy_process_group(group: Any = None) -> None:
        # The holders of a shared group give it back one by one; the environment's end destroys it.
        if group is None and torch.distributed.is_initialized():
            destroy()

    torch.distributed.new_group = new_group
    torch.distributed.destroy_process_group = destroy_process_group


def _supports(
    x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None, *others: torch.Tensor
) -> bool:
    # The kernels do not check their arguments.
    return (
        weight is not None
        and variance_size is None
        and x.shape[-1] % NORM_ELEMENTS == 0
        and all(other.dtype == x.dtype for other in (weight, *others))
        and all(each.is_contiguous() for each in (x, weight, *others))
    )


def _supports_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _supports(x, weight, variance_size)


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER, supports_args=_supports_norm
)
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _supports_add_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _supports(x, weight, variance_size, x_residual)


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER, supports_args=_supports_add_norm, inplace=True
)
def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
