"""vLLM's worker on CPUs, which uses vLLM's own C++ kernels of RMSNorm there, too.

vLLM imports it by name in the engine's process (``vllm_args.EAGER_CPU_WORKER``). vLLM 0.32 has
these kernels for CPUs but takes them on GPUs alone; on CPUs it computes RMSNorm as seven
operations of PyTorch, fit to be compiled. The import registers the kernels; the worker prefers
them.
"""

from typing import Any

import torch
from vllm import ir
from vllm.v1.worker.cpu_worker import CPUWorker

PROVIDER = "tandem"
_VECTOR = 16  # elements that the kernels take at once


class EagerCPUWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not typed
    """A worker for models that are not compiled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            op.set_default([PROVIDER, "native"])


def _fits(
    x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None, *more: torch.Tensor
) -> bool:
    """Whether the kernels, which check none of it, can take these."""
    return (
        weight is not None
        and variance_size is None
        and x.shape[-1] % _VECTOR == 0
        and all(other.dtype == x.dtype for other in (weight, *more))
        and all(each.is_contiguous() for each in (x, weight, *more))
    )


def _fits_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, variance_size)


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER, supports_args=_fits_norm
)
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fits_add_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _fits(x, weight, variance_size, x_residual)


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    PROVIDER, supports_args=_fits_add_norm, inplace=True
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
