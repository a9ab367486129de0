"""The CPU worker: its kernels compute what vLLM computes, and its process groups are one."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

EPSILON = 1e-5


class Op(NamedTuple):
    """An operation of vLLM: its native implementation and ours."""

    native: Any
    ours: Any
    supports: Any


@pytest.fixture(scope="module")
def ops() -> tuple[Op, Op]:
    from vllm import ir

    from cluster.engines.vllm.cpu_worker import PROVIDER

    ops = []
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        ours = op.impls[PROVIDER]
        ops.append(Op(op.impls["native"].impl_fn, ours.impl_fn, ours.supports_args))
    return ops[0], ops[1]


def random_tensor(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> Any:
    import torch

    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(getattr(torch, dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-6), ("float32", 1e-5)])
def test_kernels_compute_the_same_as_vllm(ops: tuple[Op, Op], dtype: str, tolerance: float) -> None:
    from torch.testing import assert_close

    norm, add_norm = ops
    x, residual = random_tensor(7, 576, dtype=dtype), random_tensor(7, 576, dtype=dtype, seed=1)
    weight = random_tensor(576, dtype=dtype, seed=2)
    near = {"rtol": tolerance, "atol": tolerance}
    assert_close(norm.ours(x, weight, EPSILON), norm.native(x, weight, EPSILON), **near)
    wanted = add_norm.native(x, residual, weight, EPSILON)
    assert_close(add_norm.ours(x.clone(), residual.clone(), weight, EPSILON), wanted, **near)


def test_kernels_decline_unsupported_arguments(ops: tuple[Op, Op]) -> None:
    norm, add_norm = ops
    x, weight = random_tensor(4, 64), random_tensor(64)
    assert norm.supports(x, weight, EPSILON)
    assert add_norm.supports(x, x.clone(), weight, EPSILON)
    assert not norm.supports(random_tensor(4, 128)[:, :64], weight, EPSILON)  # not contiguous
    assert not norm.supports(x, weight.float(), EPSILON)
    assert not norm.supports(x, None, EPSILON)
    assert not norm.supports(x, weight, EPSILON, 32)
    assert not norm.supports(random_tensor(4, 60), random_tensor(60), EPSILON)
    assert not add_norm.supports(x, x.float(), weight, EPSILON)


SHARED_GROUPS = """
from pathlib import Path
import sys

import torch
import torch.distributed

from cluster.engines.vllm.cpu_worker import _share_process_group

rendezvous = f"file://{sys.argv[1]}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
_share_process_group()
threads = {path.name for path in Path("/proc/self/task").iterdir()}
groups = [torch.distributed.new_group([0], backend="gloo") for _ in range(4)]
added = {path.name for path in Path("/proc/self/task").iterdir()} - threads
assert not added, added  # a group of its own would have a thread
tensor = torch.ones(2)
for group in groups:
    torch.distributed.all_reduce(tensor, group=group)
    torch.distributed.destroy_process_group(group)
assert tensor.tolist() == [1, 1]
torch.distributed.destroy_process_group()
torch.distributed.destroy_process_group()
assert not torch.distributed.is_initialized()
"""


def test_a_lone_worker_has_one_process_group(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED_GROUPS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_kv_cache_takes_memory_when_it_is_used() -> None:
    import torch

    from cluster.engines.vllm import cpu_worker

    size = 2**28

    def allocate() -> Any:
        return torch.zeros(size, dtype=torch.int8, device=torch.device("cpu"))

    before = anonymous_bytes()
    cache = cpu_worker._allocate_on_touch(allocate)()
    assert anonymous_bytes() - before < size / 8
    cache[: size // 2] = 1
    assert size / 4 < anonymous_bytes() - before < size * 3 / 4
    assert (cache.dtype, cache.numel(), cache[size // 2].item()) == (torch.int8, size, 0)
    assert torch.zeros(2).tolist() == [0, 0]


def anonymous_bytes() -> int:
    """Return the private memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def test_an_input_embedding_is_packed_when_it_is_multiplied() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from cluster.engines.vllm import cpu_worker

    packed: list[object] = []

    def dispatch(layer: Any, remove_weight: bool) -> None:
        packed.append(layer)
        layer.cpu_linear = lambda x, weight, bias: x * weight + bias

    embedding, head = (kind.__new__(kind) for kind in (VocabParallelEmbedding, ParallelLMHead))
    linear = SimpleNamespace()
    pack = cpu_worker._PackWhenMultiplied(dispatch)
    for layer, removes in ((embedding, False), (head, False), (linear, True)):
        pack(layer, remove_weight=removes)
    pack.finish([embedding, head, linear])
    assert packed == [head, linear]
    assert [embedding.cpu_linear(2, 3, 4) for _ in range(2)] == [10, 10]
    assert packed == [head, linear, embedding]
    pack.finish([embedding, linear])  # as in models that multiply the input embedding
    assert packed == [head, linear, embedding, embedding]
