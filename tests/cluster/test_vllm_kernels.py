"""The worker's kernels give what vLLM gives, and are left where they cannot."""

from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

EPSILON = 1e-5


class Op(NamedTuple):
    """An operation of vLLM: as it computes it, and as our worker does."""

    native: Any
    ours: Any
    fits: Any


@pytest.fixture(scope="module")
def ops() -> tuple[Op, Op]:
    from vllm import ir

    from cluster.engines.vllm.cpu_worker import PROVIDER

    found = []
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        ours = op.impls[PROVIDER]
        found.append(Op(op.impls["native"].impl_fn, ours.impl_fn, ours.supports_args))
    return found[0], found[1]


def numbers(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> Any:
    import torch

    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(getattr(torch, dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-6), ("float32", 1e-5)])
def test_the_kernels_give_what_vllm_gives(ops: tuple[Op, Op], dtype: str, tolerance: float) -> None:
    from torch.testing import assert_close

    norm, add_norm = ops
    x, residual = numbers(7, 576, dtype=dtype), numbers(7, 576, dtype=dtype, seed=1)
    weight = numbers(576, dtype=dtype, seed=2)
    near = {"rtol": tolerance, "atol": tolerance}
    assert_close(norm.ours(x, weight, EPSILON), norm.native(x, weight, EPSILON), **near)
    wanted = add_norm.native(x, residual, weight, EPSILON)
    assert_close(add_norm.ours(x.clone(), residual.clone(), weight, EPSILON), wanted, **near)


def test_what_the_kernels_would_get_wrong_is_left_to_vllm(ops: tuple[Op, Op]) -> None:
    norm, add_norm = ops
    x, weight = numbers(4, 64), numbers(64)
    assert norm.fits(x, weight, EPSILON)
    assert add_norm.fits(x, x.clone(), weight, EPSILON)
    assert not norm.fits(numbers(4, 128)[:, :64], weight, EPSILON)  # its rows do not touch
    assert not norm.fits(x, weight.float(), EPSILON)
    assert not norm.fits(x, None, EPSILON)
    assert not norm.fits(x, weight, EPSILON, 32)
    assert not norm.fits(numbers(4, 60), numbers(60), EPSILON)
    assert not add_norm.fits(x, x.float(), weight, EPSILON)
